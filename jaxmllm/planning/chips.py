"""The chips of TPU topologies, and their compiler, which runs on any machine.

Source: Google Cloud's pages on TPU v4, v5e, v5p and v6e (memory, bandwidth, peak, interconnect). Clocks are not
published for all: they follow from the peak and the size and number of matrix units; v6e's is taken to be v5p's.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from jaxmllm.errors import InputError
from jaxmllm.parallel import libtpu
from jaxmllm.parallel.mesh import arrange

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of TPU chip.

    Attributes:
      name: as topologies are called.
      memory: bytes of HBM that it is sold with; programs may use somewhat less.
      flops: peak in bfloat16, operations a second.
      bandwidth: of the HBM, bytes a second.
      clock: cycles a second.
      link: one way over one link to a neighbour, bytes a second.
      axes: of its interconnect, 2 or 3.
      options: how the compiler is asked for one device a chip.
      compiler: its own options.
    """

    name: str
    memory: int
    flops: float
    bandwidth: float
    clock: float
    link: float
    axes: int
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    compiler: Mapping[str, Any] = dataclasses.field(default_factory=dict)


# JAX cannot read the text of programs whose look-ups in tables run on these chips' SparseCores, so they do not.
ON_TENSOR_CORES = {"xla_tpu_offload_gather_to_sparsecore": False}

CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 32 * GIB, 275e12, 1228e9, 1.05e9, 50e9, 3, {"chip_config_name": "megacore"}),
        Chip("v5e", 16 * GIB, 197e12, 819e9, 1.5e9, 50e9, 2),
        Chip("v5p", 95 * GIB, 459e12, 2765e9, 1.75e9, 100e9, 3, compiler=ON_TENSOR_CORES),
        Chip("v6e", 32 * GIB, 918e12, 1640e9, 1.75e9, 100e9, 2, compiler=ON_TENSOR_CORES),
    )
}

MORE_THAN_ANY_CHIP = 1 << 44  # bytes


@dataclasses.dataclass(frozen=True, eq=False)
class Topology:
    """Chips that are wired up, known to the compiler alone.

    Attributes:
      name: such as ``v5e:4x4``.
      chip: of which kind they are.
      devices: one a chip; nothing can be put on them.
      usable: bytes of HBM that a program may use of each.
    """

    name: str
    chip: Chip
    devices: tuple[Any, ...]
    usable: int

    def mesh(self, sizes: Mapping[str, int]) -> Mesh:
        """All chips as a mesh, as a run on them would make it."""
        return arrange(sizes, self.devices)


def parse_topology(name: str) -> tuple[Chip, tuple[int, ...]]:
    """``v5e:4x4`` as chip and chips along each axis.

    Raises:
      InputError: an unknown chip, or not as many sizes as it has axes.
    """
    kind, _, shape = name.partition(":")
    chip = CHIPS.get(kind)
    if chip is None:
        raise InputError(f"topology is {name!r}; expected a chip ({', '.join(CHIPS)}) and its grid, such as v5e:4x4")
    if not re.fullmatch(r"[1-9]\d*" + r"x[1-9]\d*" * (chip.axes - 1), shape):
        example = "x".join("2" * chip.axes)
        raise InputError(f"topology is {name!r}; {kind} is wired along {chip.axes} axes: write {kind}:{example}")
    return chip, tuple(map(int, shape.split("x")))


def open_topology(name: str) -> Topology:
    """Loads the TPU compiler for a topology.

    Changes environment variables of libtpu where they are not set, so call it in a process that does not run on TPUs.

    Raises:
      InputError: a name that is not right, a topology that does not exist, or no libtpu on this machine.
    """
    chip, shape = parse_topology(name)
    libtpu.compile_only()
    from jax.experimental import topologies

    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=name, **chip.options)
    except FileNotFoundError:
        raise _without_compiler() from None
    except (jax.errors.JaxRuntimeError, RuntimeError, ValueError) as error:
        if "libtpu" in str(error) and "INVALID_ARGUMENT" not in str(error):
            raise _without_compiler() from error
        raise InputError(f"topology {name!r}: the TPU compiler knows none such ({_first_line(error)})") from error
    devices = tuple(described.devices)
    if len(devices) != math.prod(shape):
        raise InputError(
            f"topology {name!r}: the TPU compiler sees {len(devices)} devices, not {math.prod(shape)} chips"
        )
    return Topology(name, chip, devices, usable_memory(chip, devices[0]))


def usable_memory(chip: Chip, device: Any) -> int:
    """Bytes of HBM that the compiler grants a program on one chip, as it says when it is asked for far too many."""
    huge = jax.ShapeDtypeStruct((MORE_THAN_ANY_CHIP,), np.uint8, sharding=SingleDeviceSharding(device))
    try:
        jax.jit(lambda x: x + 1).lower(huge).compile()
    except jax.errors.JaxRuntimeError as error:
        return read_refusal(str(error))[1]
    raise AssertionError(f"{chip.name} took a program of {MORE_THAN_ANY_CHIP} bytes")


UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([KMGT]?)"
REFUSALS = (
    re.compile(rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)"),
    re.compile(rf"Used {_SIZE} of {_SIZE} hbm"),
)


def read_refusal(message: str) -> tuple[int, int]:
    """Bytes wanted and bytes there, from the compiler's error about memory.

    Raises:
      ValueError: the message is about something else.
    """
    for pattern in REFUSALS:
        found = pattern.search(message)
        if found is not None:
            wanted, wanted_unit, there, there_unit = found.groups()
            return int(float(wanted) * UNITS[wanted_unit]), int(float(there) * UNITS[there_unit])
    raise ValueError(message)


def _without_compiler() -> InputError:
    return InputError("planning needs the TPU compiler, which is not installed; install jaxmllm[tpu-plan] (libtpu)")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
