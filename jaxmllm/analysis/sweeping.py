"""Sweeps over many questions: how memory is planned, the work done block by block, and what it cost reported."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from jaxmllm.analysis.masking import Scope, layer_edits, run_plain
from jaxmllm.analysis.scores import BlockScores, Scores, join_scores
from jaxmllm.analysis.sharing.budget import BLOCK_ROWS, Lengths, SweepPlan, plan_sweep
from jaxmllm.analysis.sharing.compilations import Compilations, count_compilations
from jaxmllm.analysis.sharing.engine import Engine
from jaxmllm.analysis.sharing.keys import SharedKeys
from jaxmllm.analysis.sharing.rule import Segment
from jaxmllm.analysis.sharing.segments import Row, context_keys, find_rows, images_of
from jaxmllm.analysis.sharing.shapes import Shapes, choose_shapes
from jaxmllm.errors import InputError
from jaxmllm.models import forward as pure
from jaxmllm.models.edits import Edits, Positions
from jaxmllm.models.inputs import Inputs
from jaxmllm.models.sharding import rows_of_mesh
from jaxmllm.processing import append_answers, encode_answers

BATCH_SIZE = 16
CACHE_LIMIT = 4_000_000_000


@dataclasses.dataclass(frozen=True)
class SweepResult:
    """A masking sweep over some questions.

    Attributes:
      layers: the layer of each branch.
      edited: scores ``[branches, B]``.
      clean: scores ``[B]`` of the unedited model.
      early: scores ``[L, B]`` of the answer read from every layer's output (early output).
      attention: ``[L, B, N]``: head-mean attention of the last prompt token to the image tokens in the clean pass.
      cost: what it cost.
    """

    layers: tuple[int, ...]
    edited: Scores
    clean: Scores
    early: Scores
    attention: Float[np.ndarray, "L B N"]
    cost: SweepCost

    @property
    def drop(self) -> Float[np.ndarray, " branches"]:
        """Accuracy lost by layer, 0..1."""
        return np.asarray(self.clean.correct).mean() - np.asarray(self.edited.correct).mean(axis=-1)

    @property
    def change(self) -> Float[np.ndarray, "branches B"]:
        """Log-probability of the answer under each branch less that of the clean model, natural logarithm."""
        return np.asarray(self.edited.log_probability) - np.asarray(self.clean.log_probability)


@dataclasses.dataclass(frozen=True)
class SweepCost:
    """What a sweep cost.

    Attributes:
      questions: how many were asked.
      programs: compiled for it; compile_seconds: the time that took.
      seconds: all other time on the device.
      clean_seconds: the part of it spent in clean passes; 0 where that is not known apart (the plain way).
    """

    questions: int
    programs: int
    compile_seconds: float
    seconds: float
    clean_seconds: float

    @property
    def clean_passes(self) -> float:
        """All seconds in clean passes, what is done once included; NaN where that is not known."""
        return self.seconds / self.clean_seconds if self.clean_seconds else float("nan")

    def line(self) -> str:
        """One line for the console."""
        rate = self.questions / self.seconds if self.seconds else float("inf")
        passes = f", at the cost of {self.clean_passes:.1f} clean passes" if self.clean_seconds else ""
        return (
            f"{self.programs} programs compiled in {self.compile_seconds:.1f} s; {self.questions} questions in "
            f"{self.seconds:.1f} s, {rate:.2f} a second{passes}"
        )


class Sweeper:
    """Branches over many questions, block by block, fast or plain.

    Args:
      model: a loaded model.
      branches: one edit a branch.
      shapes: what blocks are padded to.
      plan: how memory is spent; ``None`` runs the plain way.
      compilations: the running count of programs.
      params: weights to use instead of ``model.params``.
      cache: folder for keys that serve every question (see ``SharedKeys``); ``None`` keeps none on disk.
      cache_limit: bytes it may take.
    """

    def __init__(
        self,
        model: Any,
        branches: Sequence[Edits],
        shapes: Shapes,
        plan: SweepPlan | None,
        compilations: Compilations,
        params: pure.Params | None = None,
        cache: Path | None = None,
        cache_limit: int = CACHE_LIMIT,
    ):
        self.model, self.branches, self.shapes = model, list(branches), shapes
        self.params = model.params if params is None else params
        self.compilations, self.questions, self.plain_seconds = compilations, 0, 0.0
        self.engine = None
        # a hook may do anything, so nothing can be said of what it leaves unchanged
        if plan is not None and not any(edits.hooks for edits in self.branches):
            # what several processes hold between them is not one process's to write
            alone = model.mesh is None or not model.mesh.is_multi_process
            keys = SharedKeys(plan.keys, cache if alone else None, cache_limit)
            self.engine = Engine(
                model.graphdef, self.params, model.config, keys, compilations, plan.keep_layers, model.mesh
            )

    def run(
        self,
        inputs: Inputs,
        answer_ids: Int[np.ndarray, "R A"],
        on_progress: Callable[[float], None] = lambda share: None,
        rows: slice | None = None,
    ) -> BlockScores:
        """Scores of a block.

        Args:
          inputs: prompts followed by their answers.
          answer_ids: the answers' tokens.
          on_progress: called with the share of the block that is done, 0..1.
          rows: which questions these are, where edits have weights for each of all questions.
        """
        branches = self.branches if rows is None else [rows_of(edits, rows) for edits in self.branches]
        self.questions += len(answer_ids)
        width = int((np.asarray(inputs.input_ids) == self.model.config.image_token_id).sum(axis=1).max(initial=0))
        if self.engine is not None:
            scores = self.engine.run_block(inputs, answer_ids, branches, self.shapes, on_progress)
            if scores is not None:
                return dataclasses.replace(scores, attention=scores.attention[..., :width])
        began, compiled = time.monotonic(), self.compilations.seconds
        scores = run_plain(self.model, self.params, inputs, answer_ids, branches)
        self.plain_seconds += time.monotonic() - began - (self.compilations.seconds - compiled)
        return dataclasses.replace(scores, attention=scores.attention[..., :width])

    def cost(self) -> SweepCost:
        clean, branches = 0.0, self.plain_seconds
        if self.engine is not None:
            clean, branches = self.engine.cost.clean_seconds, branches + self.engine.cost.branch_seconds
        return SweepCost(self.questions, self.compilations.programs, self.compilations.seconds, clean + branches, clean)


def plan_for(
    model: Any,
    branches: Sequence[Edits],
    lengths: Lengths,
    questions: int,
    a_context: float,
    batch_size: int = BATCH_SIZE,
    budget: int | None = None,
    most: int = BLOCK_ROWS,
) -> SweepPlan:
    """``plan_sweep`` for a loaded model; on a mesh, for one device: its part of the weights and of the questions.

    Raises:
      InputError: the budget does not hold a single question.
    """
    data = rows_of_mesh(model.mesh)
    return plan_sweep(
        model.config,
        branches,
        lengths,
        itemsize=model.dtype.itemsize,
        weights=size_of(model.params),
        layer_weights=size_of(model.params["decoder"]["layers"]),
        batch_size=batch_size,
        questions=-(-questions // data),
        a_context=a_context,
        budget=budget,
        most=-(-most // data),
    )


def size_of(params: Any) -> int:
    """Bytes of all leaves on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(params)
    )


def sweep(
    model: Any,
    inputs: Mapping[str, Any],
    targets: Sequence[str],
    edits: str | Sequence[Edits] = "erase",
    scope: Scope = "single",
    params: pure.Params | None = None,
    *,
    plain: bool = False,
    batch_size: int = BATCH_SIZE,
    budget: int | None = None,
    cache: str | Path | None = None,
) -> SweepResult:
    """Hides the image at every layer in turn and scores the reference answers.

    Questions are worked on in chunks, so ``inputs`` may hold a whole data set. What an edit leaves untouched is reused
    from the clean pass, and what it makes independent of the image is computed once for all questions
    (``jaxmllm.analysis.sharing.rule``); a sweep of all layers so costs about as much as two clean passes.

    Args:
      model: a loaded model.
      inputs: prompts, from ``model.prepare``.
      targets: the reference answer of each question.
      edits: ``erase``, ``blind``, ``knockout``, or edits of your own, one a branch.
      scope: which layers each branch edits; see ``layer_edits``.
      params: weights to use instead of ``model.params``.
      plain: run everything for every branch, in one batch; slow, and what the fast way is checked against.
      batch_size: questions a chunk of each device, at most.
      budget: bytes of a device's memory that the sweep may take, weights included; by default what the device grants.
      cache: folder in which keys that serve every question are kept for later sweeps, up to 4 GB.

    Raises:
      InputError, ProcessorError: edits, inputs or answers that do not fit; a budget that is too small.

    Source: arXiv 2601.08151, part 1 (layer-wise visual masking, attention evolution, early output).
    """
    branches = layer_edits(edits, scope, model.num_layers) if isinstance(edits, str) else list(edits)
    for branch in branches:
        branch.check(model.num_layers)
    if not branches:
        raise InputError("no edits to sweep over")
    prompts = append_answers(inputs, encode_answers(model.processor, targets))
    answer_ids = np.asarray(prompts["answer_ids"])
    host = jax.tree.map(np.asarray, model.as_inputs(prompts, bucketed=True))
    rows = find_rows(host, answer_ids, model.config.image_token_id) or []
    plan, shapes, block = None, Shapes((), 0, 1, 1), len(answer_ids)
    if rows and not plain:
        many = len(set(context_keys(rows, host)[1]))
        plan = plan_for(model, branches, lengths_of(rows), len(rows), len(rows) / many, batch_size, budget)
        questions, answer = [row.length(Segment.QUESTION) for row in rows], max(map(answer_length, rows))
        bodies = [row.length(Segment.BODY) for row in rows] if model.family.tokens_vary else []
        shapes = choose_shapes(questions, answer, many, plan.rows, bodies)
        block = plan.block * rows_of_mesh(model.mesh)
    with count_compilations() as compilations:
        sweeper = Sweeper(model, branches, shapes, plan, compilations, params, None if cache is None else Path(cache))
        scores = join_scores(
            [
                sweeper.run(part, answer_ids[rows_here], rows=rows_here)
                for rows_here, part in blocks_of(host, model.config.image_token_id, block)
            ]
        )
    layers = tuple(range(len(branches)))
    return SweepResult(layers, scores.edited, scores.clean, scores.early, scores.attention, sweeper.cost())


def rows_of(edits: Edits, rows: slice) -> Edits:
    """Edits for some of the questions: of position weights ``[B, ...]`` the rows that matter."""

    def take(node: Any) -> Any:
        if (
            not isinstance(node, Positions)
            or node.weights is None
            or np.ndim(node.weights) < 2
            or len(node.weights) == 1
        ):
            return node
        return Positions(node.weights[rows], node.role)

    return jax.tree.map(take, edits, is_leaf=lambda node: isinstance(node, Positions))


def answer_length(row: Row) -> int:
    """Slots of a row's answer."""
    return row.length(Segment.ANSWER)


def lengths_of(rows: Sequence[Row]) -> Lengths:
    """The longest segments of all rows."""
    return Lengths(*(max(row.length(segment) for row in rows) for segment in Segment))


def blocks_of(inputs: Inputs, image_token_id: int, size: int) -> Iterator[tuple[slice, Inputs]]:
    """Neighbouring questions, so many at a time, each block with its own images; of NumPy arrays."""
    placeholders = (inputs.input_ids == image_token_id).sum(axis=1)
    starts = np.concatenate([[0], np.cumsum(placeholders)])
    for start in range(0, len(placeholders), size):
        rows = slice(start, min(start + size, len(placeholders)))
        shown, _ = images_of(inputs.images, int(starts[rows.start]), int(starts[rows.stop] - starts[rows.start]))

        def cut(value: np.ndarray | None, rows: slice = rows) -> np.ndarray | None:
            return None if value is None else value[rows]

        yield (
            rows,
            dataclasses.replace(
                inputs,
                input_ids=cut(inputs.input_ids),
                attention_mask=cut(inputs.attention_mask),
                images=inputs.images.take(shown) if inputs.images is not None and shown else None,
                position_ids=cut(inputs.position_ids),
                answer_positions=cut(inputs.answer_positions),
            ),
        )
