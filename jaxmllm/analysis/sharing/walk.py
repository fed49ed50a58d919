"""Walks one lane through the layers: the clean run, and every branch along its trajectory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxmllm.analysis.scores import Scores
from jaxmllm.analysis.sharing.keys import StoredKeys, branch_name
from jaxmllm.analysis.sharing.plan import Needs, Plan, waits
from jaxmllm.analysis.sharing.programs import RunEdits, read_answer, run_layer, take_slice
from jaxmllm.analysis.sharing.rule import Segment, Tier, Trajectory
from jaxmllm.analysis.sharing.segments import Chunk
from jaxmllm.analysis.sharing.work import LaneWork, Segments, Target
from jaxmllm.models import forward as pure
from jaxmllm.models.attention import KeyValue
from jaxmllm.models.capture import ATTENTION, Capture
from jaxmllm.models.sharding import DATA, mesh_axis, put

if TYPE_CHECKING:
    from jaxmllm.analysis.sharing.engine import Engine

States = dict[tuple[Segments, Target], Array]

LAST_TO_IMAGE = Capture.attention(rows="last", keys="image")
HEAD: Segments = (Segment.HEAD,)
BODY: Segments = (Segment.BODY,)
TAIL: Segments = (Segment.QUESTION, Segment.ANSWER)


@dataclasses.dataclass
class Found:
    """Results as they come, still on the device: what, which branch or layer, of which chunk, values."""

    scores: list[tuple[str, int, Chunk, Scores]] = dataclasses.field(default_factory=list)
    attention: list[tuple[int, Chunk, Array]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Run:
    """Neighbouring segments that pass through a layer together."""

    segments: Segments
    tier: Tier
    keys_alone: bool


def runs_at(path: Trajectory, layer: int) -> Iterator[Run]:
    """The runs of one layer, in order. At the last one nothing but the answer's output is ever read."""
    last = layer == path.num_layers - 1
    there = [segment for segment in Segment if path.runs[layer, segment]]
    groups: list[Segments] = [(segment,) for segment in there]
    if not last and set(TAIL) <= set(there):
        groups = [*((segment,) for segment in there if segment not in TAIL), TAIL]
    for segments in groups:
        yield Run(segments, Tier(path.tier[layer, segments[0]]), last and segments != (Segment.ANSWER,))


# Positions that a CPU computes at once: beyond it activations leave the cache, which costs a sixth of the time.
CPU_POSITIONS = 1024


def examples_at_once(examples: int, positions: int) -> int:
    """How many examples a run computes together: all on an accelerator, as many as a CPU's cache likes on a CPU."""
    if jax.default_backend() != "cpu" or mesh_axis(DATA) > 1:
        return examples
    most = max(1, CPU_POSITIONS // positions)
    return next(size for size in range(min(most, examples), 0, -1) if examples % size == 0)


class Walk:
    """One lane's way through the decoder.

    Args:
      engine: the model, its cost, the store of shared keys.
      work: the lane's arrays and what is kept of its clean run.
      answer_ids: of the block.
      found: takes the results.
    """

    def __init__(self, engine: Engine, work: LaneWork, answer_ids: np.ndarray, found: Found):
        self.engine, self.work, self.answer_ids, self.found = engine, work, answer_ids, found

    def clean(self, chunk: int, wanted: Needs, unchanged: Sequence[int]) -> None:
        """The clean run of a chunk, in which attention and early output ride along.

        Args:
          chunk: its number.
          wanted: what to keep.
          unchanged: branches that get the clean scores.
        """
        work, lane = self.work, self.work.lane
        runs = np.tile(np.array(lane.present), (self.engine.num_layers, 1))
        # what stands before the image is the same for all chunks of a shared lane
        runs[:, Segment.HEAD] &= not (lane.shared and chunk)
        path = Trajectory(runs, np.tile(np.array(lane.content, int), (len(runs), 1)), np.zeros_like(runs))
        states = {
            (segments, work.target(lane.content[segments[0]], chunk)): work.embedded(segments, chunk)
            for segments in (HEAD, BODY, TAIL)
            if runs[0, segments[0]]
        }
        for layer in range(self.engine.num_layers):
            for segments, target in list(states):
                if any((layer, segment) in wanted.hidden for segment in segments):
                    work.hidden[layer, segments, target] = states[segments, target]
            for (segments, target), keys in self.advance(path, layer, [chunk], states, None, LAST_TO_IMAGE).items():
                for segment in segments:
                    if (segments == HEAD and lane.shared) or (layer, segment) in wanted.keys:
                        work.keys[layer, segment, target] = self.cut(keys, segments, segment, chunk)
            self.read("early", layer, states, [chunk])
        for number in unchanged:
            self.read("edited", number, states, [chunk])
        jax.block_until_ready(self.found.scores[-1][-1].rank)

    def branch(self, plan: Plan, chunks: Sequence[int]) -> None:
        """One branch over some chunks, from the layer at which it parts from the clean run."""
        path = plan.path
        shared = int((path.runs & (path.tier == Tier.GROUP)).sum())
        stored = None
        if shared and waits(plan, self.work.lane):
            name = branch_name(self.engine.fingerprint, self.work, plan)
            stored = self.engine.keys.open(name, shared * self.work.shared_layer_bytes(self.engine.config.text))
        states: dict[tuple[Segments, Target], Array] = {}
        for layer in range(path.start, path.num_layers):
            self.advance(path, layer, chunks, states, plan, Capture(), stored)
        if stored is not None:
            stored.close()
        self.read("edited", plan.number, states, chunks)
        jax.block_until_ready(self.found.scores[-1][-1].rank)

    def advance(
        self,
        path: Trajectory,
        layer: int,
        chunks: Sequence[int],
        states: States,
        plan: Plan | None,
        capture: Capture,
        stored: StoredKeys | None = None,
    ) -> dict[tuple[Segments, Target], KeyValue]:
        """One layer, for every run the trajectory asks for; ``states`` moves on to the next layer's input.

        Returns:
          The keys and values computed, by segments and target.
        """
        params = self.engine.layer(layer)
        now: dict[tuple[Segments, Target], KeyValue] = {}
        for run in runs_at(path, layer):
            shared = run.tier == Tier.GROUP
            if shared and stored is not None and stored.complete:
                now[run.segments, None] = stored.read(layer, run.segments[0])
                continue
            for chunk in chunks[:1] if shared else chunks:
                target = self.work.target(run.tier, chunk)
                hidden = self.start(path, layer, run, chunk, states)
                past = self.past(path, layer, run, chunk, now)
                after, own, captured = self.run(params, layer, run, hidden, past, target, plan, capture)
                states[run.segments, target] = after
                for segment in run.segments if len(run.segments) > 1 else ():
                    states.pop(((segment,), target), None)
                now[run.segments, target] = own
                if shared and stored is not None:
                    stored.write(layer, run.segments[0], own)
                if ATTENTION in captured:
                    self.found.attention.append((layer, self.work.chunk(chunk), captured[ATTENTION]))
        return now

    def run(
        self,
        params: pure.Params,
        layer: int,
        run: Run,
        hidden: Array,
        past: tuple[KeyValue, ...],
        target: Target,
        plan: Plan | None,
        capture: Capture,
    ) -> tuple[Array, KeyValue, dict[str, Array]]:
        """One run through one layer."""
        place, span = self.work.place(run.tier, target), self.work.span(run.segments, target)
        cost, size = self.engine.cost, hidden.shape[0] * (0 if run.keys_alone else hidden.shape[1])
        if plan is None:
            cost.clean_positions += size
        elif run.tier == Tier.GROUP:
            cost.shared_positions += size
        else:
            cost.branch_positions += size
        edits = RunEdits()
        if plan is not None:
            edits = self.work.edits(plan.branch, plan.touch, layer, run.segments, run.tier, target)
        return run_layer(
            self.engine.layer_graphdef,
            params,
            np.int32(layer),
            hidden,
            past,
            place.layout,
            edits,
            config=self.engine.config.text,
            start=span.start,
            stop=span.stop,
            capture=capture if Segment.ANSWER in run.segments else Capture(),
            keys_alone=run.keys_alone,
            at_once=examples_at_once(*hidden.shape[:2]),
        )

    def start(self, path: Trajectory, layer: int, run: Run, chunk: int, states: States) -> Array:
        """The residual stream that enters a run: of the layer before, or the clean run's, or zeros."""
        target = self.work.target(run.tier, chunk)
        if path.wiped[layer, list(run.segments)].any() or len(run.segments) == 1:
            return self.join([self.piece(path, layer, segment, run.tier, chunk, states) for segment in run.segments])
        if (run.segments, target) in states:
            return states[run.segments, target]
        if all(path.from_clean(layer, segment) for segment in run.segments):
            return self.work.hidden[layer, run.segments, target]
        return self.join([self.piece(path, layer, segment, run.tier, chunk, states) for segment in run.segments])

    def join(self, pieces: list[Array]) -> Array:
        return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=1)

    def piece(self, path: Trajectory, layer: int, segment: Segment, tier: Tier, chunk: int, states: States) -> Array:
        """``start`` of a single segment."""
        work = self.work
        target = work.target(tier, chunk)
        if path.wiped[layer, segment]:
            span, config = work.span((segment,), target), self.engine.config.text
            shape = (len(work.place(tier, target).numbers), span.stop - span.start, config.hidden_size)
            return put(np.zeros(shape, work.dtype), work.mesh, "examples")
        known = Tier(path.tier[max(0, layer - 1), segment])
        source: States = states
        if path.from_clean(layer, segment) and not any(segment in segments for segments, _ in states):
            known = work.lane.content[segment]
            source = {key[1:]: value for key, value in work.hidden.items() if key[0] == layer}
        at = work.target(known, chunk)
        segments = next(segments for segments, where in source if segment in segments and where == at)
        return work.lift(self.cut(source[segments, at], segments, segment, chunk), known, tier, chunk)

    def cut(self, value: Any, segments: Segments, segment: Segment, chunk: int) -> Any:
        """One segment's part of what was computed for several."""
        if segments == (segment,):
            return value
        whole, part = self.work.span(segments, chunk), self.work.span((segment,), chunk)
        return take_slice(value, start=part.start - whole.start, stop=part.stop - whole.start)

    def past(self, path: Trajectory, layer: int, run: Run, chunk: int, now: dict) -> tuple[KeyValue, ...]:
        """Keys and values of the segments before a run: the branch's own where it ran them, else the clean run's."""
        if run.keys_alone:
            return ()
        work, parts = self.work, []
        for segment in Segment:
            if segment >= run.segments[0] or not work.lane.present[segment]:
                continue
            if path.runs[layer, segment]:
                tier = Tier(path.tier[layer, segment])
                keys = now[(segment,), work.target(tier, chunk)]
            else:
                tier = work.lane.content[segment]
                keys = work.keys[layer, segment, work.target(tier, chunk)]
            parts.append(work.lift_keys(keys, tier, run.tier, chunk))
        return tuple(parts)

    def read(self, table: str, number: int, states: States, chunks: Sequence[int]) -> None:
        """Reads the answers' scores from the states that stand at the answer."""
        for chunk in chunks:
            # the last layer runs the answer alone
            segments = (Segment.ANSWER,) if ((Segment.ANSWER,), chunk) in states else TAIL
            place, shape = self.work.place(Tier.ROW, chunk), self.work.chunk(chunk)
            scores = read_answer(
                self.engine.graphdef,
                self.engine.params,
                states[segments, chunk],
                place.layout.answer_positions,
                put(self.answer_ids[shape.rows], self.work.mesh, "examples"),
                start=self.work.span(segments, chunk).start,
            )
            self.found.scores.append((table, number, shape, scores))
