"""One program on one mesh: compiled for chips that are not there, weighed and timed."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxmllm.decoding.fit import laid_out
from jaxmllm.model import make_skeleton
from jaxmllm.models.registry import family_named
from jaxmllm.models.sharding import DATA, context, param_shardings
from jaxmllm.planning.chips import Chip, Topology, read_refusal
from jaxmllm.planning.flops import count_flops, kernel_flops
from jaxmllm.planning.hlo import Collective, read_hlo


class DoesNotFitError(Exception):
    """A program wants more memory than a chip has.

    Attributes:
      wanted, there: bytes a chip.
    """

    def __init__(self, wanted: int, there: int):
        super().__init__(wanted, there)
        self.wanted, self.there = wanted, there


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """A model laid over a mesh of chips, as shapes alone.

    Attributes:
      params: nested dict of shape structs with their layout.
    """

    config: Any
    graphdef: Any
    params: dict[str, Any]
    topology: Topology
    mesh: Mesh

    @property
    def data(self) -> int:
        """Rows of the mesh."""
        return self.mesh.shape[DATA]

    def laid_out(self, tree: Any, *axes: str | None) -> Any:
        """Shapes of arrays whose axes lie along those of the mesh; the others are not cut."""
        layout = NamedSharding(self.mesh, PartitionSpec(*axes))
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout), tree)

    def rows(self, tree: Any, times: int) -> Any:
        """Arrays of one example as shapes for so many, laid along ``data``."""
        grown = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((times, *leaf.shape[1:]), leaf.dtype), tree)
        return self.laid_out(grown, DATA if times % self.data == 0 else None)


def lay_out(config: Any, dtype: str, topology: Topology, mesh: Mesh) -> Subject:
    """A model of this config on a mesh, its weights laid out as ``load`` lays them out."""
    graphdef, skeleton = make_skeleton(family_named(config.model_type).module, config, dtype, dtype)
    shardings = param_shardings(skeleton, config, mesh)
    params = jax.tree.map(
        lambda leaf, layout: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout), skeleton, shardings
    )
    return Subject(config, graphdef, params, topology, mesh)


def bytes_a_chip(tree: Any) -> int:
    """Bytes of the part of laid-out arrays that one chip holds."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@dataclasses.dataclass(frozen=True)
class ProgramCost:
    """What the compiler says of one program. Bytes and operations are those of one chip, seconds those of one run.

    Attributes:
      name: for people.
      runs: of it, a batch; ``once`` where it runs a fixed number of times in all rather than with each batch.
      memory: arguments, results and what it needs meanwhile.
      temporary: what it needs meanwhile alone.
      cycles: the compiler's estimates for its parts.
      flops: operations of its matrix products, spread evenly over the chips.
      traffic: bytes that have to pass through the chip's memory at least: arguments and results, once a step.
      collectives: exchanges between chips.
      kernels: Pallas kernels called, which the compiler does not estimate; ``kernel_flops`` their part of ``flops``.
      compile_seconds: the time that compilation took here.
    """

    name: str
    runs: float | int
    once: bool
    memory: int
    temporary: int
    cycles: int
    flops: float
    traffic: float
    collectives: tuple[Collective, ...]
    kernels: int
    kernel_flops: float
    compile_seconds: float

    def seconds(self, chip: Chip) -> float:
        """By the compiler's cycles, never less than ``least_seconds``.

        What the compiler does not estimate is added: exchanges, as rings along one link each, and kernels, at the peak.
        """
        exchange = sum(each.sent() for each in self.collectives) / chip.link
        estimated = self.cycles / chip.clock + self.kernel_flops / chip.flops + exchange
        return max(estimated, self.least_seconds(chip))

    def least_seconds(self, chip: Chip) -> float:
        """What the chip's peak and its memory allow (roofline), exchanges not counted."""
        return max(self.flops / chip.flops, self.traffic / chip.bandwidth)


@dataclasses.dataclass(frozen=True)
class Program:
    """What is to be compiled.

    Attributes:
      name: for people.
      trace: traces it, within the mesh's context.
      runs: a batch, or in all where it runs ``once``.
      steps: trips of its loops whose length is data.
    """

    name: str
    trace: Callable[[], Any]
    runs: float | int = 1
    steps: int = 1
    once: bool = False


def compile_program(subject: Subject, program: Program) -> tuple[ProgramCost, Any]:
    """Compiles a program for the topology.

    Returns:
      What it costs, and the shapes of its results, laid over the mesh as it leaves them.

    Raises:
      DoesNotFitError: it needs more memory than a chip has.
    """
    chips = subject.mesh.size
    with context(subject.mesh):
        traced = program.trace()
        flops = count_flops(traced.jaxpr.jaxpr, program.steps) / chips
        in_kernels = kernel_flops(traced.jaxpr.jaxpr, program.steps) / chips
        lowered = traced.lower()
        began = time.monotonic()
        try:
            compiled = lowered.compile(dict(subject.topology.chip.compiler))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise DoesNotFitError(*read_refusal(str(error))) from error
    results = laid_out(lowered.out_info, compiled)
    sizes = compiled.memory_analysis()
    arguments, outputs = sizes.argument_size_in_bytes, sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    reading = read_hlo(compiled.as_text(), program.steps)
    cost = ProgramCost(
        name=program.name,
        runs=program.runs,
        once=program.once,
        memory=arguments + outputs + sizes.temp_size_in_bytes,
        temporary=sizes.temp_size_in_bytes,
        cycles=reading.cycles,
        flops=flops,
        traffic=float(program.steps * (arguments + outputs)),
        collectives=reading.collectives,
        kernels=reading.kernels,
        kernel_flops=in_kernels if reading.kernels else 0.0,
        compile_seconds=time.monotonic() - began,
    )
    return cost, results
