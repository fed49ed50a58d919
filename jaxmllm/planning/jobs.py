"""The programs of a clean pass and of generation, compiled for one size of batch."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from jaxmllm.analysis.masking import CLEAN_CAPTURE
from jaxmllm.decoding.generate import room_for, run_prompts, run_tokens
from jaxmllm.decoding.rules import OneByOne
from jaxmllm.models.capture import Capture
from jaxmllm.models.forward import forward_named
from jaxmllm.planning.programs import Program, ProgramCost, Subject, bytes_a_chip, compile_program
from jaxmllm.planning.work import Work, one_question


@dataclasses.dataclass(frozen=True)
class Batch:
    """A batch of a job on one mesh.

    Attributes:
      rows: questions of the batch, over all chips.
      programs: what runs.
      kept: bytes a chip of what outlives a program, beside the weights: key-value caches, layer copies, waiting states.
      peak: the most that is alive at once, bytes a chip.
    """

    rows: int
    programs: tuple[ProgramCost, ...]
    kept: dict[str, int]
    peak: int


def compile_forward(subject: Subject, work: Work, rows: int) -> Batch:
    """One clean pass with the captures of a study, logits at the answer.

    Raises:
      DoesNotFitError: the program needs more memory than a chip has.
    """
    inputs = subject.rows(one_question(subject.config, work, answered=True), rows)

    def trace() -> jax.stages.Traced:
        return forward_named.trace(subject.graphdef, subject.params, inputs, None, CLEAN_CAPTURE, "answer")

    cost, _ = compile_program(subject, Program("clean pass", trace))
    return Batch(rows, (cost,), {}, cost.memory)


def compile_evaluate(subject: Subject, work: Work, rows: int) -> Batch:
    """The pass over prompts and the loop over new tokens, as ``generate`` compiles them.

    Raises:
      DoesNotFitError: a program needs more memory than a chip has.
    """
    inputs = subject.rows(one_question(subject.config, work, answered=False), rows)
    room = room_for(work.new_tokens)

    def trace_prompts() -> jax.stages.Traced:
        return run_prompts.trace(subject.graphdef, subject.params, inputs, None, Capture(), room)

    first, (prompts, cache) = compile_program(subject, Program("prompts", trace_prompts))

    def trace_tokens() -> jax.stages.Traced:
        endings = (np.zeros(1, np.int32), np.int32(0))
        limit = np.int32(work.new_tokens)
        return run_tokens.trace(
            subject.graphdef, subject.params, prompts, cache, None, OneByOne(None), None, endings, limit, room
        )

    # the first of the new tokens follows from the prompts
    then, _ = compile_program(subject, Program("new tokens", trace_tokens, steps=max(1, work.new_tokens - 1)))
    return Batch(rows, (first, then), {"key-value cache": bytes_a_chip(cache)}, max(first.memory, then.memory))
