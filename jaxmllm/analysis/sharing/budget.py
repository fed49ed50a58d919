"""Plans a sweep's memory before it runs, by formulas, with the rule itself saying what has to be kept.

Letters: L layers, D width, k = 2 x key-value heads x head width, b bytes a number; P, N, Q, A slots of head, body,
question and answer; B rows and I contexts a chunk.

==================  =================================================================================
weights             what the model holds
layer copies        the decoder's weights once more, cut into layers; left out where they do not fit
chunk               the largest run of a layer, and what its branches need of the chunk's clean run:
                    I N k b a layer for image keys (knockout), I N D b a layer for image states (blind)
waiting             (Q + A) D b a layer and question, for branches that run once for a whole block (erase)
shared keys         branches x layers x (P + N) k b if all are kept; one layer of one branch at least
==================  =================================================================================
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxmllm.analysis.sharing.plan import Needs, Plan, needs, plan_lane, waits
from jaxmllm.analysis.sharing.rule import Segment, Tier
from jaxmllm.analysis.sharing.segments import Lane, find_rows, make_lanes
from jaxmllm.analysis.sharing.shapes import Shapes
from jaxmllm.analysis.sharing.touch import settle
from jaxmllm.errors import InputError
from jaxmllm.memory import default_budget, gigabytes
from jaxmllm.models.attention import QUERY_CHUNK
from jaxmllm.models.edits import Edits, Positions
from jaxmllm.models.inputs import Inputs
from jaxmllm.models.text_config import DecoderConfig

# Questions that wait together, at most: enough that what is computed once for all of them no longer counts.
BLOCK_ROWS = 1024


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Slots of the segments of a typical question."""

    head: int
    body: int
    question: int
    answer: int

    @property
    def total(self) -> int:
        return self.head + self.body + self.question + self.answer


@dataclasses.dataclass(frozen=True)
class SweepPlan:
    """How a sweep will run within its budget. All sizes are bytes.

    Attributes:
      rows, contexts: questions and images a chunk.
      block: questions whose states wait together.
      keep_layers: whether every layer's weights are held a second time, apart.
      keys: room for shared keys that are kept between blocks.
      parts: what takes how much.
      shared_keys: what the shared keys of all branches would take together; ``layer_keys`` one layer of one branch.
      clean_passes: clean passes a question; one_off the clean passes that are done once for all questions.
    """

    budget: int
    rows: int
    contexts: int
    block: int
    keep_layers: bool
    keys: int
    parts: dict[str, int]
    shared_keys: int
    layer_keys: int
    clean_passes: float
    one_off: float

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def lines(self) -> list[str]:
        """The plan in words, for the console."""
        taken = ", ".join(f"{name} {gigabytes(size)}" for name, size in self.parts.items())
        return [
            f"memory {gigabytes(self.total)} of {gigabytes(self.budget)}: {taken}",
            f"shared keys: {gigabytes(self.shared_keys)} in all, {gigabytes(self.layer_keys)} a layer of one branch, "
            f"{gigabytes(self.keys)} kept",
            f"chunks of {self.rows} questions over {self.contexts} images, blocks of {self.block} questions; about "
            f"{self.clean_passes:.1f} clean passes a question, and {self.one_off:.1f} once",
        ]


def plan_sweep(
    config: Any,
    branches: Sequence[Edits],
    lengths: Lengths,
    *,
    itemsize: int,
    weights: int,
    layer_weights: int,
    batch_size: int,
    questions: int,
    a_context: float = 1.0,
    budget: int | None = None,
    most: int = BLOCK_ROWS,
) -> SweepPlan:
    """Plans a sweep.

    Args:
      config: of the model.
      branches: one edit a branch.
      lengths: of a typical question, the longest where they differ.
      itemsize: bytes of a number the decoder computes in.
      weights: bytes of the model's weights; ``layer_weights`` those of all its decoder layers.
      batch_size: rows a chunk, at most; it is halved until a chunk fits.
      questions: how many will be asked.
      a_context: questions an image.
      budget: bytes of device memory for everything; by default ``default_budget()``.
      most: questions a block, at most.

    Raises:
      InputError: the budget does not hold a chunk of one question; it says what is needed.
    """
    budget = default_budget() if budget is None else budget
    lane, plans = typical_plans(config, branches, lengths)
    text: DecoderConfig = config.text
    late = [plan for plan in plans if waits(plan, lane)]
    acting = [plan for plan in plans if plan.path.changes_answer]
    layer_keys = (lengths.head + lengths.body) * 2 * text.num_kv_heads * text.head_dim * itemsize
    shared_keys = sum(_shared_layers(plan) for plan in late) * layer_keys
    waiting = kept_bytes(needs(late), lengths, text, itemsize, rows=1, contexts=0)
    parts = {"weights": weights}
    rows = max(1, min(batch_size, questions))
    while True:
        contexts = max(1, round(rows / a_context))
        chunk = kept_bytes(needs(acting), lengths, text, itemsize, rows, contexts)
        chunk += _work(config, lengths, itemsize, rows, contexts) + layer_keys
        left = budget - weights - chunk - rows * waiting
        if left >= 0:
            break
        if rows == 1:
            raise InputError(
                f"a sweep needs {gigabytes(budget - left)} for one question and the budget is {gigabytes(budget)}; "
                "raise the budget, use a smaller dtype, or sweep fewer edits at a time"
            )
        rows //= 2
    keep_layers = layer_weights <= left // 2
    left -= layer_weights if keep_layers else 0
    block = min(max(rows, questions), max(rows, most))
    many_blocks = questions > block or block * waiting > left + rows * waiting
    keys = shared_keys if many_blocks and shared_keys <= left // 2 else 0
    left -= keys
    if waiting:
        block = max(rows, min(block, (left + rows * waiting) // waiting // rows * rows))
    parts |= {"layer copies": layer_weights if keep_layers else 0, "chunk": chunk, "waiting": block * waiting}
    if keys:
        parts["shared keys"] = keys
    passes = _passes(acting, lane, lengths, text.num_layers, a_context)
    return SweepPlan(budget, rows, contexts, block, keep_layers, keys, parts, shared_keys, layer_keys, *passes)


def typical_plans(config: Any, branches: Sequence[Edits], lengths: Lengths) -> tuple[Lane, list[Plan]]:
    """The rule, applied to one question of the given lengths."""
    ids = np.full((1, lengths.total + 1), int(config.image_token_id == 0), np.int32)
    ids[:, lengths.head : lengths.head + lengths.body] = config.image_token_id
    first = lengths.total - lengths.answer
    inputs = Inputs(
        ids, np.ones_like(ids), None, None, first + np.arange(lengths.answer, dtype=np.int32)[None], lengths.body
    )
    rows = find_rows(inputs, np.zeros((1, lengths.answer), np.int32), config.image_token_id)
    if rows is None:
        raise AssertionError("a causal question always has segments")
    (lane,) = make_lanes(rows, inputs, Shapes((lengths.question,), lengths.answer, 1, 1))
    num_layers, num_heads = config.text.num_layers, config.text.num_heads
    branches = [
        jax.tree.map(functools.partial(_stand_in, ids.shape[1], lengths.body), edits, is_leaf=_is_positions)
        for edits in branches
    ]
    settled = settle(branches, inputs, config.image_token_id, num_layers, num_heads)
    return lane, plan_lane(settled, rows, lane, num_layers)


def _is_positions(node: Any) -> bool:
    return isinstance(node, Positions)


def _stand_in(length: int, image_tokens: int, node: Any) -> Any:
    """Weights of a typical question in place of those of real ones: whole stays whole, all else is in part."""
    if not isinstance(node, Positions) or node.weights is None:
        return node
    weights = np.asarray(node.weights)
    value = 1.0 if node.role == "image" and (weights == 1).all() else 0.5 * bool((weights != 0).any())
    slots = image_tokens if node.role == "image" else length
    return Positions(np.full(slots, value, np.float32), node.role)


def kept_bytes(needed: Needs, lengths: Lengths, text: DecoderConfig, itemsize: int, rows: int, contexts: int) -> int:
    """Bytes kept of the clean run of one chunk."""
    size = (lengths.head, lengths.body, lengths.question, lengths.answer)
    many = (1 if contexts else 0, contexts, rows, rows)
    # a run of question and answer is kept as one array
    hidden = set(needed.hidden)
    hidden |= {(layer, Segment.QUESTION) for layer, segment in hidden if segment == Segment.ANSWER}
    states = sum(many[segment] * size[segment] for _, segment in hidden) * text.hidden_size
    keys = sum(many[segment] * size[segment] for _, segment in needed.keys) * 2 * text.num_kv_heads * text.head_dim
    return (states + keys) * itemsize


def _work(config: Any, lengths: Lengths, itemsize: int, rows: int, contexts: int) -> int:
    """Bytes of the largest run while it passes through a layer: activations, scores, logits."""
    text: DecoderConfig = config.text
    slots = max(contexts * lengths.body, rows * (lengths.question + lengths.answer))
    wide = 6 * text.hidden_size + 3 * text.intermediate_size + 2 * text.num_heads * text.head_dim
    activations = slots * wide * itemsize
    queries = max(contexts * min(QUERY_CHUNK, lengths.body), rows * min(QUERY_CHUNK, lengths.question + lengths.answer))
    heads = text.num_heads // text.num_kv_heads if jax.default_backend() == "cpu" else text.num_heads
    scores = 3 * 4 * queries * heads * lengths.total
    logits = 3 * 4 * rows * lengths.answer * text.vocab_size
    return activations + max(scores, logits)


def _shared_layers(plan: Plan) -> int:
    return int((plan.path.runs & (plan.path.tier == Tier.GROUP)).any(axis=1).sum())


def _passes(
    plans: Sequence[Plan], lane: Lane, lengths: Lengths, num_layers: int, a_context: float
) -> tuple[float, float]:
    """Clean passes a question, and once, in layers x positions."""
    size = np.array([lengths.head, lengths.body, lengths.question, lengths.answer])
    share = {Tier.GROUP: 0.0, Tier.CONTEXT: 1.0 / a_context, Tier.ROW: 1.0}
    whole = num_layers * lengths.total
    own = num_layers * float(sum(share[tier] * length for tier, length in zip(lane.content, size, strict=True)))
    once = 0.0
    for plan in plans:
        full = plan.path.runs.copy()
        full[-1, : Segment.ANSWER] = False  # keys alone
        for tier, part in share.items():
            own += part * float(((full & (plan.path.tier == tier)) * size).sum())
        once += float(((full & (plan.path.tier == Tier.GROUP)) * size).sum())
    return own / whole, once / whole
