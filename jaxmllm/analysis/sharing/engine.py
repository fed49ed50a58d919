"""Runs blocks of questions: the clean pass, then every branch, each only as far as ``rule.trace`` says it must.

Order of work: branch outer, layer middle, examples inner. What a branch shares advances one layer, serves every chunk
of questions, and is dropped, so that one layer of one branch is alive at a time. Branches that need what is large in
the clean run, an image's keys or states, run while their chunk's are at hand; the others wait for the whole block.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Int

from jaxmllm.analysis.scores import BlockScores, Scores
from jaxmllm.analysis.sharing.compilations import Compilations
from jaxmllm.analysis.sharing.keys import SharedKeys, fingerprint
from jaxmllm.analysis.sharing.plan import Plan, needs, plan_lane, waits
from jaxmllm.analysis.sharing.programs import take_layer
from jaxmllm.analysis.sharing.segments import find_rows, make_lanes, shapes_of
from jaxmllm.analysis.sharing.shapes import Shapes
from jaxmllm.analysis.sharing.touch import settle
from jaxmllm.analysis.sharing.walk import Found, Walk
from jaxmllm.analysis.sharing.work import LaneWork
from jaxmllm.models import forward as pure
from jaxmllm.models.edits import Edits
from jaxmllm.models.inputs import Inputs
from jaxmllm.models.sharding import context, rows_of_mesh, to_host


@dataclasses.dataclass
class Cost:
    """What the blocks cost so far.

    Attributes:
      clean_seconds: clean passes with their captures; branch_seconds: all branches. Compilation is in neither.
      clean_positions, branch_positions, shared_positions: layers x positions computed in clean passes, in branches for
        single chunks, and in branches once for all questions of a lane.
      plain_positions: layers x positions of one clean pass over every question alone.
    """

    clean_seconds: float = 0.0
    branch_seconds: float = 0.0
    clean_positions: int = 0
    branch_positions: int = 0
    shared_positions: int = 0
    plain_positions: int = 0

    @property
    def clean_passes(self) -> float:
        """Clean passes a question, counted in layers x positions; without what is done once for all questions."""
        return (self.clean_positions + self.branch_positions) / max(1, self.plain_positions)


class Engine:
    """A model made ready for sweeps: its layers apart, the keys that blocks share, what it all cost.

    Args:
      graphdef, params, config: of the model.
      keys: where keys that serve every question are kept between blocks.
      compilations: the running count, so that its seconds can be told from the work's.
      keep_layers: keep a copy of every layer's weights, instead of cutting it out of the stack each time.
      mesh: devices that hold the params; ``None`` where that is one device.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        params: pure.Params,
        config: Any,
        keys: SharedKeys,
        compilations: Compilations,
        keep_layers: bool = True,
        mesh: Mesh | None = None,
    ):
        self.graphdef, self.params, self.config, self.mesh = graphdef, params, config, mesh
        self.keys, self.compilations, self.cost = keys, compilations, Cost()
        self.layer_graphdef, state = nnx.split(pure.merge(graphdef, params).decoder.layers)
        self.stacked = nnx.to_pure_dict(state)
        self.num_layers = config.text.num_layers
        self.kept = [self.cut(layer) for layer in range(self.num_layers)] if keep_layers else None

    @functools.cached_property
    def fingerprint(self) -> str:
        """What names the model in the store of shared keys; its weights are summed only if that outlives the engine."""
        if not self.keys.outlives_run:
            return ""
        precision = getattr(jax.config, "jax_default_matmul_precision")  # noqa: B009  made at run time
        settings = f"{jax.default_backend()} {precision} {self.config.text}"
        return f"{fingerprint(self.params['decoder'])} {settings}"

    def cut(self, number: int) -> pure.Params:
        return take_layer(self.stacked, np.int32(number))

    def layer(self, number: int) -> pure.Params:
        """The weights of one decoder layer."""
        return self.cut(number) if self.kept is None else self.kept[number]

    def run_block(
        self,
        inputs: Inputs,
        answer_ids: Int[np.ndarray, "R A"],
        branches: Sequence[Edits],
        shapes: Shapes | int,
        on_progress: Callable[[float], None] = lambda share: None,
    ) -> BlockScores | None:
        """Clean pass and every branch over a block of questions.

        Args:
          inputs: prompts followed by their answers.
          answer_ids: the answers' tokens.
          branches: edits without hooks.
          shapes: what chunks are padded to; a number is a chunk's size, and the rest follows from the block.
          on_progress: called with the share of the block that is done, 0..1.

        Returns:
          Scores, or ``None`` where nothing can be reused: an attention mask lets prompts see their answers, or rotary
          angles depend on the longest sequence of the batch.
        """
        inputs = jax.tree.map(np.asarray, inputs)
        rope = self.config.text.rope
        longest = inputs.input_ids.shape[1] if inputs.position_ids is None else int(inputs.position_ids.max()) + 1
        if rope.kind == "dynamic" and longest > rope.original_max_positions:
            return None
        rows = find_rows(inputs, answer_ids, self.config.image_token_id)
        if rows is None:
            return None
        text = self.config.text
        without_images = dataclasses.replace(inputs, images=None)
        settled = settle(branches, without_images, self.config.image_token_id, text.num_layers, text.num_heads)
        shapes = shapes_of(rows, inputs, shapes) if isinstance(shapes, int) else shapes
        found = Found()
        lanes = [lane.side_by_side(rows_of_mesh(self.mesh)) for lane in make_lanes(rows, inputs, shapes)]
        steps, done = len(branches) * sum(len(lane.chunks) for lane in lanes), 0

        def step(chunks: int) -> None:
            nonlocal done
            done += chunks
            on_progress(min(1.0, done / max(1, steps)))

        for lane in lanes:
            work = LaneWork(
                self.graphdef,
                self.params,
                inputs,
                self.config.image_token_id,
                rows,
                lane,
                text.windows is not None,
                self.mesh,
            )
            with context(self.mesh):
                self.run_lane(work, answer_ids, plan_lane(settled, rows, lane, self.num_layers), found, step)
        self.cost.plain_positions += self.num_layers * sum(row.ends[-1] for row in rows)
        return self.collect(found, len(branches), len(rows), inputs.max_image_tokens)

    def run_lane(
        self,
        work: LaneWork,
        answer_ids: np.ndarray,
        plans: Sequence[Plan],
        found: Found,
        step: Callable[[int], None],
    ) -> None:
        """All branches of one lane; branches that leave the answer alone are given the clean scores."""
        walk = Walk(self, work, answer_ids, found)
        acting = [plan for plan in plans if plan.path.changes_answer]
        local, waiting = ([plan for plan in acting if waits(plan, work.lane) is late] for late in (False, True))
        wanted, later = needs(acting), needs(waiting)
        chunks = range(len(work.lane.chunks))
        for chunk in chunks:
            with self.clock("clean_seconds"):
                walk.clean(chunk, wanted, [plan.number for plan in plans if not plan.path.changes_answer])
            with self.clock("branch_seconds"):
                for plan in local:
                    walk.branch(plan, [chunk])
                    step(1)
            work.forget(chunk, later)
        with self.clock("branch_seconds"):
            for plan in waiting:
                walk.branch(plan, list(chunks))
                step(len(chunks))

    @contextmanager
    def clock(self, phase: str) -> Iterator[None]:
        began, compiled = time.monotonic(), self.compilations.seconds
        yield
        spent = time.monotonic() - began - (self.compilations.seconds - compiled)
        setattr(self.cost, phase, getattr(self.cost, phase) + max(0.0, spent))

    def collect(self, found: Found, branches: int, rows: int, image_tokens: int) -> BlockScores:
        """Scores by row."""

        def empty(first: int) -> Scores:
            shape = (first, rows)
            return Scores(np.zeros(shape, np.float32), np.zeros(shape, bool), np.zeros(shape, np.int32))

        tables = {"edited": empty(branches), "early": empty(self.num_layers)}
        attention = np.zeros((self.num_layers, rows, image_tokens), np.float32)
        for layer, chunk, weights in found.attention:
            values = to_host(weights)[chunk.kept, 0]
            attention[layer, chunk.rows[chunk.kept], : values.shape[-1]] = values
        for table, number, chunk, scores in found.scores:
            for field in dataclasses.fields(Scores):
                values = to_host(getattr(scores, field.name))
                getattr(tables[table], field.name)[number, chunk.rows[chunk.kept]] = values[chunk.kept]
        clean = jax.tree.map(lambda values: values[-1].copy(), tables["early"])
        return BlockScores(tables["edited"], clean, tables["early"], attention)
