"""Which mesh a model runs on, and which part of it belongs to which group of processes.

All devices form one mesh with axes ``data`` and ``model``. A row of it (fixed ``data``) holds one copy of the model.
Processes that share a row form a *group*; a group computes on its own rows, and groups divide the questions between
them without ever talking to each other. So a slow process holds nobody up, and no result depends on how many there are.

"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from jaxmllm.convert.plan import flatten
from jaxmllm.errors import InputError
from jaxmllm.models.sharding import DATA, MODEL, param_specs, rows_of_mesh

AXES = (DATA, MODEL)
# Share of a device's memory that weights may take where the mesh is chosen; the rest is for the work.
WEIGHTS_SHARE = 0.6


@dataclasses.dataclass(frozen=True)
class Group:
    """The processes that hold copies of the model together, and what they run.

    Attributes:
      mesh: its rows of the mesh; ``None`` where that is one device.
      index: its number of ``count`` groups.
      leader: whether this process writes the group's results.
    """

    mesh: Mesh | None = None
    index: int = 0
    count: int = 1
    leader: bool = True

    @property
    def data(self) -> int:
        """Rows of its mesh."""
        return rows_of_mesh(self.mesh)


def parse_mesh(text: str) -> dict[str, int]:
    """``data=4,model=2`` as a mapping; an axis left out is 1.

    Raises:
      InputError: anything else.
    """
    sizes = dict.fromkeys(AXES, 1)
    for part in text.split(","):
        name, _, number = part.strip().partition("=")
        if name not in sizes or not number.isdigit() or int(number) < 1:
            raise InputError(f"mesh is {text!r}; expected sizes of the axes data and model, such as data=4,model=2")
        sizes[name] = int(number)
    return sizes


def check_mesh(text: str | None) -> None:
    """Checks sizes that were given by hand before anything is loaded.

    Raises:
      InputError: as ``parse_mesh`` and ``arrange``.
    """
    if text is not None:
        arrange(parse_mesh(text))


def choose_mesh(skeleton: Mapping[str, Any], config: Any, devices: int, memory: int) -> dict[str, int]:
    """The mesh for a model: the smallest ``model`` axis with which weights leave room for the work.

    Args:
      skeleton: leaves with ``shape`` and ``dtype``.
      config: of the model; the axis has to divide its heads.
      devices: how many there are.
      memory: bytes of one device.
    """
    sizes = model_sizes(config, devices)
    for model in sizes:
        if bytes_a_device(skeleton, config, {DATA: devices // model, MODEL: model}) <= WEIGHTS_SHARE * memory:
            break
    else:
        model = sizes[-1]
    return {DATA: devices // model, MODEL: model}


def model_sizes(config: Any, devices: int) -> list[int]:
    """Sizes of the ``model`` axis that divide both the devices and the decoder's heads, ascending."""
    return [size for size in range(1, devices + 1) if devices % size == 0 and config.text.num_heads % size == 0]


def bytes_a_device(skeleton: Mapping[str, Any], config: Any, sizes: Mapping[str, int]) -> int:
    """Bytes of weights that each device of a mesh of these sizes holds."""
    specs = flatten(param_specs(skeleton, config, abstract_mesh(sizes)))
    total = 0
    for path, leaf in flatten(skeleton).items():
        cut = math.prod(sizes[axis] for axis in specs[path] if axis is not None)
        total += math.prod(leaf.shape) * leaf.dtype.itemsize // cut
    return total


def abstract_mesh(sizes: Mapping[str, int]) -> AbstractMesh:
    """A mesh without devices, to plan with."""
    return AbstractMesh(tuple(sizes[axis] for axis in AXES), AXES, axis_types=(AxisType.Auto,) * 2)


def arrange(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of these sizes over all devices.

    Rows stay within a process where they fit, so that processes depend on each other as little as they can; longer
    rows are laid out by JAX along the links of the machine.

    Raises:
      InputError: there are not as many devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = tuple(sizes[axis] for axis in AXES)
    if math.prod(shape) != len(devices):
        named = ",".join(f"{axis}={size}" for axis, size in zip(AXES, shape, strict=True))
        raise InputError(
            f"mesh {named} takes {math.prod(shape)} devices and there are {len(devices)} ({devices[0].device_kind}, in "
            f"{jax.process_count()} process(es)); choose sizes whose product is {len(devices)}"
        )
    auto = (AxisType.Auto,) * 2
    local = sum(device.process_index == devices[0].process_index for device in devices)
    if local % shape[1] == 0:
        ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
        return Mesh(np.array(ordered).reshape(shape), AXES, axis_types=auto)
    return jax.make_mesh(shape, AXES, axis_types=auto, devices=devices)


def group_of(mesh: Mesh, process: int) -> Group:
    """The group that a process belongs to.

    Args:
      mesh: over all devices.
      process: index of the process.
    """
    rows = [frozenset(device.process_index for device in row) for row in mesh.devices]
    groups: list[set[int]] = []
    for members in rows:
        joined = set(members).union(*(group for group in groups if group & members))
        groups = [*(group for group in groups if not group & members), joined]
    groups.sort(key=min)
    index = next(number for number, group in enumerate(groups) if process in group)
    own = mesh.devices[[members <= groups[index] for members in rows]]
    part = None if own.size == 1 else Mesh(own, AXES, axis_types=(AxisType.Auto,) * 2)
    return Group(part, index, len(groups), process == min(groups[index]))


def device_memory() -> int:
    """Bytes of one device: what it says, or its share of the machine's memory where it does not say."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // jax.local_device_count()
