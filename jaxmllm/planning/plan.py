"""Plans a job over the meshes of a topology: the batch that fits, bytes a chip, time by the compiler's estimates."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxmllm.errors import InputError
from jaxmllm.memory import gigabytes
from jaxmllm.model import make_skeleton
from jaxmllm.models.registry import family_named
from jaxmllm.models.sharding import DATA, MODEL
from jaxmllm.parallel.mesh import bytes_a_device, model_sizes
from jaxmllm.planning.chips import CHIPS, Topology, open_topology
from jaxmllm.planning.jobs import Batch, compile_evaluate, compile_forward
from jaxmllm.planning.programs import DoesNotFitError, ProgramCost, Subject, bytes_a_chip, lay_out
from jaxmllm.planning.sweeps import compile_sweep
from jaxmllm.planning.work import Work

# Questions that a row of the mesh takes together, at most: beyond it chips are busy already.
MOST_ROWS = 32

COMPILERS: dict[str, Callable[[Subject, Work, int], Batch]] = {
    "evaluate": compile_evaluate,
    "forward": compile_forward,
    "sweep": compile_sweep,
}


@dataclasses.dataclass(frozen=True)
class MeshPlan:
    """A job on one mesh. Bytes are those of one chip.

    Attributes:
      sizes: of the axes ``data`` and ``model``.
      rows: questions of a batch over all chips; 0 where not even one a row of the mesh fits.
      parameters: weights; ``kept`` what else outlives a program; ``peak`` all that is alive at once, programs' own
        needs included; where nothing fits, what is wanted.
      programs: what runs.
      seconds: the whole job by the compiler's estimates; ``least_seconds`` by what chips can do at most.
    """

    sizes: dict[str, int]
    rows: int
    parameters: int
    kept: dict[str, int]
    peak: int
    programs: tuple[ProgramCost, ...] = ()
    seconds: float = math.inf
    least_seconds: float = math.inf

    @property
    def fits(self) -> bool:
        return self.rows > 0

    @property
    def working(self) -> int:
        """Bytes of inputs, results and temporaries."""
        return max(0, self.peak - self.parameters - sum(self.kept.values()))

    @property
    def name(self) -> str:
        """As ``--mesh`` takes it."""
        return ",".join(f"{axis}={size}" for axis, size in self.sizes.items())

    @property
    def compile_seconds(self) -> float:
        """The time that compilation took here."""
        return sum(program.compile_seconds for program in self.programs)


@dataclasses.dataclass(frozen=True)
class JobPlan:
    """A job on a topology.

    Attributes:
      family: the model's.
      work: what is asked.
      topology: its name; ``chips`` how many it has; ``usable`` bytes of HBM that the compiler grants on each.
      meshes: one plan a mesh, by ascending ``model``.
    """

    family: str
    work: Work
    topology: str
    chips: int
    usable: int
    meshes: tuple[MeshPlan, ...]

    @property
    def best(self) -> MeshPlan:
        """The mesh that takes least time."""
        return min(self.meshes, key=lambda plan: plan.seconds)

    def rate(self, plan: MeshPlan) -> float:
        """Questions a second, all that is done once included."""
        return self.work.questions / plan.seconds

    def chip_hours(self, plan: MeshPlan) -> float:
        """Of all questions."""
        return self.chips * plan.seconds / 3600


def plan_job(
    config: Any,
    work: Work,
    topology: str,
    mesh: Mapping[str, int] | None = None,
    on_mesh: Callable[[str], None] = lambda name: None,
) -> JobPlan:
    """Compiles a job for a TPU topology and says whether it fits and what it should cost. Needs no TPU and no weights.

    Changes environment variables of libtpu where they are not set, so call it in a process that does not run on TPUs.

    Args:
      config: of the model, as its family's ``read_config`` returns it.
      work: the job and its questions.
      topology: chips and how they are wired: ``v5e:4x4``, ``v5p:2x2x2``.
      mesh: sizes of ``data`` and ``model``; by default all whose ``model`` divides the decoder's heads are tried.
      on_mesh: called with the name of each mesh before it is tried.

    Raises:
      InputError: no such job, topology or mesh; no TPU compiler; or the job fits on no mesh that was tried: it says by
        how much, and what would make it fit.
    """
    work.check()
    opened = open_topology(topology)
    chips = len(opened.devices)
    candidates = [dict(mesh)] if mesh is not None else _meshes(config, chips)
    for sizes in candidates:
        if math.prod(sizes.values()) != chips or config.text.num_heads % sizes[MODEL]:
            raise InputError(
                f"mesh is {_named(sizes)}; expected sizes whose product is the {chips} chips of {topology} and whose "
                f"model axis divides the decoder's {config.text.num_heads} heads"
            )
    plans = []
    for sizes in candidates:
        on_mesh(_named(sizes))
        plans.append(plan_mesh(config, work, opened, sizes))
    plan = JobPlan(config.model_type, work, topology, chips, opened.usable, tuple(plans))
    if not any(each.fits for each in plans):
        raise InputError(_refusal(config, plan))
    return plan


def plan_mesh(config: Any, work: Work, topology: Topology, sizes: Mapping[str, int]) -> MeshPlan:
    """The largest batch that fits on one mesh (a power of two a row), and its cost.

    Few sizes are compiled: of one that is refused the compiler says what it wants, and beside the weights that grows
    with the batch, so the next one is the largest that may fit by this.
    """
    subject = lay_out(config, work.dtype, topology, topology.mesh(sizes))
    parameters = bytes_a_chip(subject.params)
    if parameters > topology.usable:
        return MeshPlan(dict(sizes), 0, parameters, {}, parameters)
    most = min(MOST_ROWS, work.questions // subject.data)
    rows = _power_of_two(most) if work.rows is None else work.rows
    while True:
        try:
            batch = COMPILERS[work.job](subject, work, rows * subject.data)
        except DoesNotFitError as refused:
            if rows == 1 or work.rows is not None:
                return MeshPlan(dict(sizes), 0, parameters, {}, max(refused.wanted, parameters))
            room = (topology.usable - parameters) / max(1, refused.wanted - parameters)
            rows = min(rows // 2, _power_of_two(rows * room))
        else:
            break
    batches = math.ceil(work.questions / batch.rows)

    def total(seconds: Callable[[ProgramCost], float]) -> float:
        return sum(cost.runs * (1 if cost.once else batches) * seconds(cost) for cost in batch.programs)

    return MeshPlan(
        sizes=dict(sizes),
        rows=batch.rows,
        parameters=parameters,
        kept=batch.kept,
        peak=batch.peak,
        programs=batch.programs,
        seconds=total(lambda cost: cost.seconds(topology.chip)),
        least_seconds=total(lambda cost: cost.least_seconds(topology.chip)),
    )


def _power_of_two(size: float | int) -> int:
    """The largest power of two up to ``size``, 1 at least."""
    return 2 ** int(math.log2(max(1, size)))


def _meshes(config: Any, chips: int) -> list[dict[str, int]]:
    return [{DATA: chips // model, MODEL: model} for model in model_sizes(config, chips)]


def _named(sizes: Mapping[str, int]) -> str:
    return ",".join(f"{axis}={size}" for axis, size in sizes.items())


def _refusal(config: Any, plan: JobPlan) -> str:
    """By how much a job does not fit, and what would make it fit."""
    work, least = plan.work, min(plan.meshes, key=lambda each: each.peak)
    rows = work.rows or 1
    asked = "one question" if rows == 1 else f"{rows} questions"
    return (
        f"{work.job} of {config.model_type} in {work.dtype} does not fit {plan.topology}: with mesh {least.name} and "
        f"{asked} a row it wants {gigabytes(least.peak)} a chip, {gigabytes(least.peak - plan.usable)} more than the "
        f"{gigabytes(plan.usable)} that a program may use (weights alone take {gigabytes(least.parameters)}). "
        f"What would make it fit: {'; '.join(_remedies(config, plan, least))}."
    )


def _remedies(config: Any, plan: JobPlan, least: MeshPlan) -> list[str]:
    work, ways = plan.work, []
    larger = [size for size in model_sizes(config, plan.chips) if size > least.sizes[MODEL]]
    if larger:
        ways.append(f"a larger model axis on these chips (up to {larger[-1]})")
    if work.rows not in (None, 1):
        ways.append("a smaller batch")
    if work.dtype == "float32":
        ways.append("bfloat16, which takes half of it")
    needed = _model_axis_that_fits(config, plan, least)
    if needed is not None:
        ways.append(f"a topology of at least {needed} such chips with model={needed}")
    roomy = [chip.name for chip in CHIPS.values() if chip.memory >= least.peak / 0.95]
    if roomy:
        ways.append(f"chips with more memory ({', '.join(roomy)})")
    return ways or ["a smaller model, or shorter questions"]


def _model_axis_that_fits(config: Any, plan: JobPlan, least: MeshPlan) -> int | None:
    """The smallest ``model`` axis beyond the chips there are whose weights leave room for what else is wanted."""
    module = family_named(config.model_type).module
    _, skeleton = make_skeleton(module, config, plan.work.dtype, plan.work.dtype)
    besides = least.peak - least.parameters
    sizes: Sequence[int] = [size for size in range(1, 129) if config.text.num_heads % size == 0 and size > plan.chips]
    for size in sizes:
        if bytes_a_device(skeleton, config, {DATA: 1, MODEL: size}) + besides <= 0.95 * plan.usable:
            return size
    return None
