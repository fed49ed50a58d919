"""How weights and activations are laid over a mesh: one table from logical axis names to mesh axes, for all families.

A mesh has two axes. Examples are laid along ``data``; heads, the feed-forward width and the vocabulary along ``model``,
as in Megatron-LM (arXiv 1909.08053): each attention and feed-forward block then needs one sum over ``model``. What XLA
does in between follows from the layout of the weights and of the residual stream (GSPMD, arXiv 2105.04663).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

# A pytree of arrays.
Leaf = Any

DATA, MODEL = "data", "model"

# Logical axis -> mesh axis. An axis that is not here is never cut.
RULES = {
    "examples": DATA,
    "heads": MODEL,
    "kv_heads": MODEL,
    "vision_heads": MODEL,
    "ff": MODEL,
    "vocab": MODEL,
    "vocab_width": MODEL,
}

Axes = tuple[str | None, ...]

# Path of a leaf -> its logical axes, counted from the last; the first line that matches counts. Where the first choice
# does not divide, the next one is tried. Leaves without a line are held whole by every device: norms, embeddings of
# positions, fused query-key-value weights of vision towers, the Q-Former.
LEAVES: tuple[tuple[str, tuple[Axes, ...]], ...] = (
    (r"decoder/layers/attention/query/(kernel|bias)", (("heads",),)),
    (r"decoder/layers/attention/(key|value)/(kernel|bias)", (("kv_heads",),)),
    (r"decoder/layers/attention/out/kernel", (("heads", None),)),
    (r"vision/layers/attention/(query|key|value)/(kernel|bias)", (("vision_heads",),)),
    (r"vision/layers/attention/out/kernel", (("vision_heads", None),)),
    (r"(decoder|vision)/layers/mlp/(gate|up)/(kernel|bias)", (("ff",),)),
    (r"(decoder|vision)/layers/mlp/down/kernel", (("ff", None),)),
    (r"decoder/embed/embedding", (("vocab", None), ("vocab_width",))),
    (r"decoder/head/kernel", (("vocab",), ("vocab_width", None))),
)


def param_specs(skeleton: Mapping[str, Any], config: Any, mesh: Mesh | AbstractMesh) -> dict[str, Any]:
    """The layout of every leaf of the params pytree.

    Args:
      skeleton: nested dict of leaves with a ``shape``.
      config: of the model; heads are never cut through.
      mesh: with axes ``data`` and ``model``.

    Returns:
      A nested dict of partition specs.
    """
    counts = {
        "heads": config.text.num_heads,
        "kv_heads": config.text.num_kv_heads,
        "vision_heads": config.vision.num_heads,
    }

    def walk(tree: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        return {
            key: walk(value, f"{prefix}{key}/") if isinstance(value, Mapping) else spec(f"{prefix}{key}", value.shape)
            for key, value in tree.items()
        }

    def spec(path: str, shape: tuple[int, ...]) -> PartitionSpec:
        choices = next((axes for pattern, axes in LEAVES if re.fullmatch(pattern, path)), ())
        for axes in choices:
            whole = (None,) * (len(shape) - len(axes)) + axes
            sizes = [counts.get(axis or "", size) for axis, size in zip(whole, shape, strict=True)]
            cut = [_cut(axis, size, mesh.shape) for axis, size in zip(whole, sizes, strict=True)]
            if any(cut):
                return PartitionSpec(*cut)
        return PartitionSpec()

    return walk(skeleton, "")


def param_shardings(skeleton: Mapping[str, Any], config: Any, mesh: Mesh) -> dict[str, Any]:
    """``param_specs`` on their mesh: a nested dict of ``NamedSharding``."""
    specs = param_specs(skeleton, config, mesh)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, PartitionSpec))


def _cut(axis: str | None, size: int, mesh: Mapping[str, int]) -> str | None:
    """The mesh axis that a logical axis of this size is cut along."""
    name = RULES.get(axis or "")
    return name if name is not None and mesh[name] > 1 and size % mesh[name] == 0 else None


def context(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """In this context ``constrain`` and fused kernels know the mesh; also where a function is being traced."""
    return contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def rows_of_mesh(mesh: Mesh | None) -> int:
    """Size of the axis that examples are laid along."""
    return 1 if mesh is None else mesh.shape[DATA]


def mesh_axis(name: str) -> int:
    """Size of an axis of the context's mesh; 1 where there is none."""
    return dict(jax.sharding.get_abstract_mesh().shape).get(name, 1)


def constrain(value: Array, *axes: str | None) -> Array:
    """The value, laid over the context's mesh by its logical axes (those left out at the end are not cut).

    Without a mesh in the context this is the value itself.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or DATA not in mesh.shape:
        return value
    cut = [_cut(axis, size, mesh.shape) for axis, size in zip(axes, value.shape, strict=False)]
    return jax.lax.with_sharding_constraint(value, PartitionSpec(*cut))


def put(value: Any, mesh: Mesh | None, *axes: str | None) -> Array:
    """Puts an array of the host on the device, or lays it over the mesh by its logical axes.

    Args:
      value: the same on every process that the mesh spans.
      mesh: ``None`` for the default device.
      axes: logical axes; those left out at the end are not cut, nor is one whose size does not divide.
    """
    if mesh is None:
        return jax.device_put(value)
    cut = [_cut(axis, size, mesh.shape) for axis, size in zip(axes, np.shape(value), strict=False)]
    sharding = NamedSharding(mesh, PartitionSpec(*cut))
    if sharding.is_fully_addressable:
        return jax.device_put(value, sharding)
    return jax.make_array_from_callback(np.shape(value), sharding, lambda index: np.asarray(value[index]))


def put_rows(tree: Leaf, mesh: Mesh | None) -> Leaf:
    """Lays the leading axis of every array of the host along ``data``; what is on devices or traced stays as it is."""
    if mesh is None:
        return tree
    return jax.tree.map(
        lambda leaf: leaf if isinstance(leaf, jax.Array) else put(np.asarray(leaf), mesh, "examples"), tree
    )


def to_host(tree: Leaf) -> Leaf:
    """Every array of a pytree as a NumPy array, also where other processes hold a part of it (they all have to ask)."""

    def fetch(leaf: Any) -> np.ndarray:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
            return np.asarray(leaf)
        if not leaf.is_fully_replicated:
            assert isinstance(leaf.sharding, NamedSharding)
            leaf = _gathered(leaf, NamedSharding(leaf.sharding.mesh, PartitionSpec()))
        return np.asarray(leaf.addressable_data(0))

    return jax.tree.map(fetch, tree)


def _gathered(leaf: Array, whole: NamedSharding) -> Array:
    return jax.jit(lambda value: value, out_shardings=whole)(leaf)
