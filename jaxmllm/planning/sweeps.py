"""The programs of the fast sweep: each kind of run of a layer compiled once, and counted as the rule says.

What runs how often follows from the rule that the sweep itself goes by (``jaxmllm.analysis.sharing.rule``), applied to
a typical question; nothing is estimated from clean passes.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmllm.analysis.blocks import unit_rows
from jaxmllm.analysis.sharing.budget import Lengths, kept_bytes, typical_plans
from jaxmllm.analysis.sharing.plan import Plan, needs, waits
from jaxmllm.analysis.sharing.programs import RunEdits, read_answer, run_layer
from jaxmllm.analysis.sharing.rule import Segment, Tier, Trajectory
from jaxmllm.analysis.sharing.segments import Lane
from jaxmllm.analysis.sharing.walk import LAST_TO_IMAGE, TAIL, Run, runs_at
from jaxmllm.models import forward as pure
from jaxmllm.models.attention import KeyValue
from jaxmllm.models.capture import Capture
from jaxmllm.models.layout import Layout
from jaxmllm.models.registry import family_named
from jaxmllm.models.sharding import DATA, MODEL
from jaxmllm.parallel.mesh import group_of
from jaxmllm.planning.jobs import Batch
from jaxmllm.planning.programs import (
    DoesNotFitError,
    Program,
    ProgramCost,
    Subject,
    bytes_a_chip,
    compile_program,
)
from jaxmllm.planning.work import Work, one_question


@dataclasses.dataclass(frozen=True)
class Kind:
    """What decides the program of a run of one layer.

    Attributes:
      run: its segments and tier.
      past: tiers of the segments before it, whose keys it reads.
      edits: kinds of edit that act on it.
      clean: whether it belongs to the clean pass, which keeps attention.
    """

    run: Run
    past: tuple[tuple[Segment, Tier], ...]
    edits: tuple[str, ...]
    clean: bool

    @property
    def name(self) -> str:
        """For people."""
        parts = "+".join(segment.name.lower() for segment in self.run.segments)
        told = "clean" if self.clean else " ".join(("edited", *self.edits))
        return f"{told} {parts}, once a {self.run.tier.name.lower()}"


@dataclasses.dataclass(frozen=True)
class Counted:
    """What a sweep of one typical question runs.

    Attributes:
      lane, plans: as the rule has them.
      kinds: how often each kind of run passes through a layer, for a chunk of questions (a block, for tier GROUP).
    """

    lane: Lane
    plans: Sequence[Plan]
    kinds: dict[Kind, int]


def count_runs(config: Any, work: Work, lengths: Lengths) -> Counted:
    """Applies the rule of the fast sweep to a typical question."""
    layers = config.text.num_layers
    lane, plans = typical_plans(config, work.branches(layers), lengths)
    runs = np.tile(np.array(lane.present), (layers, 1))
    clean = Trajectory(runs, np.tile(np.array(lane.content, int), (layers, 1)), np.zeros_like(runs))
    kinds: collections.Counter[Kind] = collections.Counter(_kinds_of(clean, None, lane))
    for plan in plans:
        if plan.path.changes_answer:
            kinds.update(_kinds_of(plan.path, plan, lane))
    return Counted(lane, plans, dict(kinds))


def _kinds_of(path: Trajectory, plan: Plan | None, lane: Lane) -> Iterable[Kind]:
    """The runs of every layer. The last layer, of which a sweep computes less, counts like the others, so that it needs
    no programs of its own: that is too much by less than one layer."""
    layers = range(0 if plan is None else path.start, path.num_layers)
    path = Trajectory(*(np.concatenate([part, part[-1:]]) for part in (path.runs, path.tier, path.wiped)))
    for layer in layers:
        for run in runs_at(path, layer):
            before = [segment for segment in Segment if segment < run.segments[0] and lane.present[segment]]
            past = tuple(
                (segment, Tier(path.tier[layer, segment]) if path.runs[layer, segment] else lane.content[segment])
                for segment in before
            )
            yield Kind(run, past, () if plan is None else _acting(plan, run), plan is None)


def _acting(plan: Plan, run: Run) -> tuple[str, ...]:
    """Kinds of edit that the program of a run has a place for."""
    touched = {"erase": plan.touch.inputs, "blind": plan.touch.keys, "knockout": plan.touch.outputs}
    return tuple(
        kind for kind, acts in touched.items() if getattr(plan.branch, kind) and acts[:, list(run.segments)].any()
    )


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Examples of each tier, in a chunk over all chips."""

    lengths: Lengths
    rows: int
    contexts: int

    def examples(self, tier: Tier) -> int:
        return {Tier.GROUP: 1, Tier.CONTEXT: self.contexts, Tier.ROW: self.rows}[tier]

    def length(self, segment: Segment) -> int:
        lengths = self.lengths
        return (lengths.head, lengths.body, lengths.question, lengths.answer)[segment]

    def start(self, segment: Segment) -> int:
        return sum(self.length(before) for before in Segment if before < segment)


def layer_program(subject: Subject, kind: Kind, count: int, sizes: Sizes, num_axes: int) -> Program:
    """``run_layer`` of one kind.

    Args:
      subject: the model on its mesh.
      kind: of run.
      count: how often a chunk runs it, or a block where all questions share it.
      sizes: of a chunk.
      num_axes: of rotary positions.
    """
    config, tier, segments = subject.config, kind.run.tier, kind.run.segments
    many = sizes.examples(tier)
    start, stop = sizes.start(segments[0]), sizes.start(segments[-1]) + sizes.length(segments[-1])
    slots = sizes.lengths.total if tier == Tier.ROW else sizes.lengths.head + sizes.lengths.body
    text = config.text

    def struct(dtype: Any, *shape: int, model: int | None = None) -> Any:
        rows = DATA if shape and shape[0] > 1 and shape[0] % subject.data == 0 else None
        axes = [rows, *([None] * (len(shape) - 1))] if shape else []
        if model is not None and shape[model] % subject.mesh.shape[MODEL] == 0:
            axes[model] = MODEL
        return subject.laid_out(jax.ShapeDtypeStruct(shape, dtype), *axes)

    graphdef, layers = nnx.split(pure.merge(subject.graphdef, subject.params).decoder.layers)
    params = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape[1:],
            leaf.dtype,
            sharding=jax.sharding.NamedSharding(subject.mesh, jax.sharding.PartitionSpec(*leaf.sharding.spec[1:])),
        ),
        nnx.to_pure_dict(layers),
    )
    dtype = subject.params["decoder"]["embed"]["embedding"].dtype
    heads = (text.num_kv_heads, text.head_dim)
    kept = [struct(dtype, sizes.examples(of), sizes.length(part), *heads, model=2) for part, of in kind.past]
    past = tuple(KeyValue(leaf, leaf) for leaf in kept)
    positions = (many, slots) if num_axes == 1 else (many, slots, num_axes)
    layout = Layout(
        image=struct(jnp.bool_, many, slots),
        valid=struct(jnp.bool_, many, slots),
        positions=struct(jnp.int32, *positions),
        mask=None,
        answer_positions=struct(jnp.int32, many, sizes.lengths.answer) if tier == Tier.ROW else None,
        max_image_tokens=sizes.lengths.body,
        place=None if text.windows is None else struct(jnp.int32, many, slots),
    )
    weights = struct(jnp.float32, many, slots)
    gate = struct(jnp.float32)
    terms = {"erase": (gate, weights), "blind": (gate, weights), "knockout": (gate, weights, weights)}
    edits = RunEdits(**{name: (terms[name],) for name in kind.edits})
    capture = LAST_TO_IMAGE if kind.clean and Segment.ANSWER in segments else Capture()

    def trace() -> jax.stages.Traced:
        return run_layer.trace(
            graphdef,
            params,
            struct(jnp.int32),
            struct(dtype, many, stop - start, text.hidden_size),
            past,
            layout,
            edits,
            config=text,
            start=start,
            stop=stop,
            capture=capture,
            keys_alone=False,
            at_once=many,
        )

    return Program(kind.name, trace, runs=count, once=tier == Tier.GROUP)


def compile_sweep(subject: Subject, work: Work, rows: int) -> Batch:
    """A chunk of the fast sweep: images encoded, every kind of run of a layer, answers read.

    Args:
      subject: the model on its mesh.
      work: what is asked.
      rows: questions a chunk, over all chips.

    Raises:
      DoesNotFitError: a program, or all that is kept between programs, needs more memory than a chip has.
    """
    config, layers = subject.config, subject.config.text.num_layers
    question = one_question(config, work, answered=True, bucketed=False)
    body = question.max_image_tokens
    # the last prompt token is where the answer is read, and counts to it
    lengths = Lengths(work.prefix_tokens, body, work.question_tokens - 1, work.answer_tokens + 1)
    counted = count_runs(config, work, lengths)
    # where image tokens depend on the question, two questions about one image are two contexts
    a_context = 1.0 if family_named(config.model_type).reads_question else work.a_context
    contexts = max(1, round(rows / a_context))
    sizes = Sizes(lengths, rows, contexts)
    num_axes = 1 if question.position_ids is None else question.position_ids.shape[-1]
    branches = len(counted.plans)
    whole = [_encode(subject, question, contexts), _read(subject, sizes, layers + branches)]
    of_layer = [layer_program(subject, kind, count, sizes, num_axes) for kind, count in counted.kinds.items()]
    over_all, over_layer = ([compile_program(subject, each)[0] for each in some] for some in (whole, of_layer))
    weights = bytes_a_chip(subject.params)
    # programs of a layer hold a copy of its weights, the others all weights, which are counted already
    working = max(max(cost.memory - weights for cost in over_all), max(cost.memory for cost in over_layer))
    return _weigh(subject, work, counted, sizes, [*over_all, *over_layer], working)


def _encode(subject: Subject, question: Any, contexts: int) -> Program:
    arrays = subject.rows(question.images.arrays, contexts)
    return Program("images", lambda: pure.encode_images.trace(subject.graphdef, subject.params, arrays))


def _read(subject: Subject, sizes: Sizes, times: int) -> Program:
    dtype = subject.params["decoder"]["embed"]["embedding"].dtype
    tail = sizes.lengths.question + sizes.lengths.answer
    hidden = subject.rows(jax.ShapeDtypeStruct((1, tail, subject.config.text.hidden_size), dtype), sizes.rows)
    places = subject.rows(jax.ShapeDtypeStruct((1, sizes.lengths.answer), np.int32), sizes.rows)

    def trace() -> jax.stages.Traced:
        start = sizes.start(TAIL[0])
        return read_answer.trace(subject.graphdef, subject.params, hidden, places, places, start=start)

    return Program("answers read", trace, runs=times)


def _weigh(
    subject: Subject, work: Work, counted: Counted, sizes: Sizes, costs: Sequence[ProgramCost], working: int
) -> Batch:
    """What is kept between programs, as ``plan_sweep`` spends memory, on one chip.

    Args:
      subject, work, counted, sizes: of the sweep.
      costs: of its programs.
      working: bytes of the hungriest of them, beside what is kept.

    Raises:
      DoesNotFitError: it leaves no room for the programs.
    """
    text, lane, lengths = subject.config.text, counted.lane, sizes.lengths
    on_chip = subject.mesh.shape[MODEL] if text.num_kv_heads % subject.mesh.shape[MODEL] == 0 else 1
    text = dataclasses.replace(text, num_kv_heads=text.num_kv_heads // on_chip)
    itemsize = subject.params["decoder"]["embed"]["embedding"].dtype.itemsize
    acting = [plan for plan in counted.plans if plan.path.changes_answer]
    late = [plan for plan in acting if waits(plan, lane)]
    waiting = kept_bytes(needs(late), lengths, text, itemsize, rows=1, contexts=0)
    rows, contexts = (math.ceil(size / subject.data) for size in (sizes.rows, sizes.contexts))
    chunk = kept_bytes(needs(acting), lengths, text, itemsize, rows, contexts)
    weights = bytes_a_chip(subject.params)
    copies = bytes_a_chip(subject.params["decoder"]["layers"])
    usable = subject.topology.usable
    left = usable - weights - chunk - working - rows * waiting
    if left < 0:
        raise DoesNotFitError(usable - left, usable)
    copied = copies if copies <= left // 2 else 0
    # units are those of one group of processes, on its own rows of the mesh
    own = group_of(subject.mesh, min(device.process_index for device in subject.mesh.devices.flat)).data
    most = math.ceil(unit_rows(work.questions, rows, own) / own)
    block = max(rows, min(most, (left - copied) // waiting // rows * rows + rows)) if waiting else most
    kept = {"layer copies": copied, "kept of the clean pass": chunk, "waiting states": block * waiting}
    blocks = math.ceil(work.questions / (block * subject.data))
    programs = tuple(dataclasses.replace(cost, runs=cost.runs * blocks) if cost.once else cost for cost in costs)
    return Batch(sizes.rows, programs, kept, weights + sum(kept.values()) + working)
