"""Answering with any method: the passes that it asks for, in order."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from PIL import Image

from jaxmllm.analysis.edits import compose
from jaxmllm.decoding.generate import (
    MAX_NEW_TOKENS,
    Generated,
    check_prompts,
    ending_of,
    generated,
    room_for,
    row_keys,
    run_prompts,
    run_tail,
    run_tokens,
)
from jaxmllm.decoding.sampling import Sampling
from jaxmllm.errors import InputError
from jaxmllm.methods import tails
from jaxmllm.methods.base import Method, Second
from jaxmllm.methods.first import AskIn, Count, Evidence, First, one_image
from jaxmllm.methods.regions import Box, ImageMap
from jaxmllm.models import forward as pure
from jaxmllm.models.capture import Capture
from jaxmllm.models.edits import Edits, Positions
from jaxmllm.models.sharding import context, put_rows, to_host
from jaxmllm.processing import ImageLike, as_list, make_prompt, open_image


@dataclasses.dataclass(frozen=True)
class Answered:
    """A batch answered by a method.

    Attributes:
      generated: the answers.
      maps: what the method looked by, an image map an example; ``None`` where it needs none.
      pictures: what it showed in the second place; ``boxes`` what part of the original each is.
      findings: what its reader found in the first pass, on the host.
      count: passes an example.
    """

    generated: Generated
    maps: tuple[ImageMap, ...] | None
    pictures: tuple[Image.Image, ...] | None
    boxes: tuple[Box, ...] | None
    findings: Any
    count: Count


class Answers(list[str]):
    """Answers as a list of texts, with all that led to them.

    Attributes:
      details: the batch; see ``Answered``.
      maps: shortcut to its maps, for ``jaxmllm.report.figures.overlay(image, map.values, map.tokens)``; one an answer,
        or ``None``.
    """

    def __init__(self, texts: Sequence[str], details: Answered):
        super().__init__(texts)
        self.details = details

    @property
    def maps(self) -> tuple[ImageMap, ...] | None:
        return self.details.maps


def answer(
    model: Any,
    images: Sequence[ImageLike | Sequence[ImageLike]],
    questions: Sequence[str],
    *,
    method: Method | None = None,
    evidence: Sequence[Evidence] | None = None,
    **options: Any,
) -> Answers:
    """Answers questions about images.

    Args:
      model: a loaded model.
      images: for each question one image, or a list of them.
      questions: plain questions, or whole prompts that hold the image placeholder.
      method: how they are answered, one of ``jaxmllm.methods``; by default plainly.
      evidence: boxes in pixels for each question, for the method that is told where to look.
      options: ``max_new_tokens``, ``sampling``, ``key``, ``row_numbers``, ``edits``, ``stop_tokens`` and ``params`` as
        for ``generate``.

    Raises:
      ProcessorError, InputError: as ``model.prepare`` and ``generate``; or the method does not fit the model.
    """
    pictures = [[open_image(image) for image in as_list(entry)] for entry in images]
    details = answer_by(
        model,
        model.prepare(pictures, questions),
        pictures,
        questions,
        Method() if method is None else method,
        evidence=evidence,
        **options,
    )
    return Answers(details.generated.texts or (), details)


def answer_by(
    model: Any,
    inputs: Mapping[str, np.ndarray],
    images: Sequence[Sequence[Image.Image]],
    questions: Sequence[str],
    method: Method,
    *,
    ask_in: AskIn | None = None,
    evidence: Sequence[Evidence] | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    sampling: Sampling | None = None,
    key: Array | None = None,
    row_numbers: Sequence[int] | None = None,
    edits: Edits | None = None,
    stop_tokens: Sequence[int] | None = None,
    params: pure.Params | None = None,
) -> Answered:
    """Answers a batch whose arrays are prepared.

    Args:
      model: a loaded model.
      inputs: from ``model.prepare`` of the same images and questions.
      images: upright RGB, a list an example.
      questions: as for ``answer``.
      method: how they are answered.
      ask_in: makes the prompt of another question about an example; by default through the chat template.
      evidence, max_new_tokens, sampling, key, row_numbers, edits, stop_tokens, params: as for ``answer``.

    Raises:
      InputError: as ``generate``; or the method does not fit the model or the examples.
    """
    batch, layers = len(questions), model.num_layers
    checked = model.as_inputs(inputs, bucketed=True)
    check_prompts(checked, max_new_tokens)
    edits = joined(edits, method.edits(layers))
    if edits is not None:
        edits.check(layers)
    if method.reader(layers) is not None:
        one_image(checked, method.name)
    rule, room = method.rule(layers, sampling), room_for(max(max_new_tokens, method.decodes))
    params = model.params if params is None else params
    numbers = tuple(range(batch)) if row_numbers is None else tuple(row_numbers)
    keys = row_keys(batch, sampling, key, row_numbers)
    with context(model.mesh):
        seen_by = put_rows(method.views(model, checked, numbers), model.mesh)
        count = Count(prompts=len(seen_by.input_ids) / batch)
        capture = method.capture(layers).with_also(rule.capture)
        edits = for_views(edits, batch, len(seen_by.input_ids) // batch)
        prompts, cache = run_prompts(model.graphdef, params, seen_by, edits, capture, room, method.reader(layers))
        first = First(
            model=model,
            params=params,
            images=images,
            questions=questions,
            ask_in=ask_in or (lambda text, row: make_prompt(model.processor, text, 1)),
            row_numbers=numbers,
            evidence=tuple(evidence) if evidence is not None else (None,) * batch,
            inputs=checked,
            edits=edits,
            prompts=prompts,
            cache=cache,
            count=count,
        )
        second = method.second(first)
        if second is not None:
            prompts, cache, edits = go_on(first, second, rule.capture, room, method.name)
        else:
            cache = first.cache
        findings = to_host(first.prompts.findings)
        del first  # and with it the first prompts' cache, before there is a third
        done = run_tokens(
            model.graphdef, params, prompts, cache, edits, rule, keys,
            ending_of(model, stop_tokens), np.int32(max_new_tokens), room,
        )  # fmt: skip
        count.tokens += float(to_host(done.passes))
        second = second or Second()
        return Answered(
            generated=generated(model, done, prompts.captured),
            maps=second.maps,
            pictures=second.pictures,
            boxes=second.boxes,
            findings=findings,
            count=count,
        )


def go_on(first: First, second: Second, capture: Capture, room: int, name: str) -> tuple[Any, Any, Edits | None]:
    """The second pass: over what follows the first image, or over the last tokens once more.

    Returns:
      What the pass left, its cache, and the edits in force.
    """
    model, edits = first.model, joined(first.edits, second.edits)
    one_image(first.inputs, name)
    _no_places(first.edits, name)
    if second.pictures is not None:
        tail, keep = tails.of_pictures(model, first.inputs, first.texts, second.pictures)
    else:
        tail, keep = tails.of_same(model, first.inputs, second.again)
    one_token = second.pictures is None and second.again == "last"
    first.count.tokens += one_token
    first.count.prompts += not one_token
    before, tail = first.prompts.bare(), put_rows(tail, model.mesh)
    passed = run_tail(model.graphdef, first.params, before, first.cache, keep, tail, edits, capture, room)
    return *passed, edits


def joined(one: Edits | None, other: Edits | None) -> Edits | None:
    """Both, or the one there is; ``None`` is another program than edits that do nothing."""
    return one if other is None else other if one is None else compose(one, other)


def for_views(edits: Edits | None, batch: int, views: int) -> Edits | None:
    """Edits for as many rows as there are views: weights that are given for each example serve all of its views."""
    if edits is None or views == 1:
        return edits

    def repeated(side: Positions) -> Positions:
        if side.weights is None or np.ndim(side.weights) != 2 or len(side.weights) != batch:
            return side
        return dataclasses.replace(side, weights=jnp.concatenate([jnp.asarray(side.weights)] * views))

    return dataclasses.replace(
        edits,
        erase=tuple(dataclasses.replace(term, positions=repeated(term.positions)) for term in edits.erase),
        blind=tuple(dataclasses.replace(term, positions=repeated(term.positions)) for term in edits.blind),
        knockout=tuple(
            dataclasses.replace(term, queries=repeated(term.queries), keys=repeated(term.keys))
            for term in edits.knockout
        ),
    )


def _no_places(edits: Edits | None, name: str) -> None:
    """Raises InputError for edits whose weights count positions of the first prompt."""
    edits = edits or Edits()
    positions = [term.positions for term in (*edits.erase, *edits.blind)]
    positions += [side for term in edits.knockout for side in (term.queries, term.keys)]
    if any(each.weights is not None and each.role == "all" for each in positions):
        raise InputError(
            f"method {name!r} runs a second prompt, in which the position weights of an edit would mean other tokens; "
            "name a role, or weights over the image tokens"
        )
