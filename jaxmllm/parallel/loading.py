"""A model on all devices that there are."""

from __future__ import annotations

from pathlib import Path

import jax

from jaxmllm.convert import checkpoint
from jaxmllm.model import Model, find_checkpoint, load, make_skeleton
from jaxmllm.models.registry import family_of
from jaxmllm.parallel.mesh import Group, arrange, choose_mesh, device_memory, group_of, parse_mesh


def load_over(path: str | Path, dtype: str = "float32", mesh: str | None = None) -> tuple[Model, Group]:
    """Loads a model over the devices of all processes.

    Args:
      path: as for ``jaxmllm.load``.
      dtype: what the model computes in, and what its weights are kept in.
      mesh: sizes of the axes (``data=4,model=2``); by default chosen from the sizes of the model and of the memory.

    Returns:
      The model on the devices of this process's group, and the group.

    Raises:
      InputError: the mesh does not fit the devices.
      JaxmllmError: as ``jaxmllm.load``.
    """
    if mesh is None and jax.device_count() == 1:
        return load(path, dtype), Group()
    folder = find_checkpoint(path)
    if mesh is None:
        fields = checkpoint.read_json(folder / "config.json")
        family = family_of(fields)
        config = family.read_config(fields)
        _, skeleton = make_skeleton(family.module, config, dtype, dtype)
        sizes = choose_mesh(skeleton, config, jax.device_count(), device_memory())
    else:
        sizes = parse_mesh(mesh)
    group = group_of(arrange(sizes), jax.process_index())
    return load(folder, dtype, mesh=group.mesh), group
