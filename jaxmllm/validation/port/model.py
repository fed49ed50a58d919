"""A checkpoint in the port, whole or with one decoder layer at a time in memory."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmllm.convert import checkpoint
from jaxmllm.convert.names import NameTable
from jaxmllm.convert.plan import flatten, unflatten
from jaxmllm.convert.tables import NAME_TABLES
from jaxmllm.convert.weights import Weights, open_weights
from jaxmllm.memory import trim
from jaxmllm.model import Model, find_checkpoint, load, make_skeleton
from jaxmllm.models.forward import Params, merge
from jaxmllm.models.inputs import Inputs, as_inputs
from jaxmllm.models.registry import family_of

LAYERS = "decoder/layers/"


@dataclasses.dataclass(frozen=True)
class Port:
    """The port of a checkpoint, as a model with one decoder layer that can be any of its layers.

    Attributes:
      config: of the family, with all layers.
      folder: the checkpoint's.
      model: the whole model; ``None`` where only one decoder layer is held at a time.
      outer: params beside the decoder's layers.
      read: leaf path, layer or ``None`` -> the leaf as the port holds it, that layer's part where it is stacked.
      layer: number -> the params of one decoder layer, each with a leading axis of 1.
      graphdef: number -> structure of a model whose only decoder layer is that one.
      dtype: what it computes in.
    """

    config: Any
    folder: Path
    model: Model | None
    outer: Params
    read: Callable[[str, int | None], np.ndarray]
    layer: Callable[[int], Params]
    graphdef: Callable[[int], nnx.GraphDef]
    dtype: str

    @property
    def num_layers(self) -> int:
        return self.config.text.num_layers

    @property
    def table(self) -> NameTable:
        """The names of the checkpoint's tensors, as the port reads them."""
        return NAME_TABLES[self.config.model_type](self.config)

    def params(self, number: int = 0) -> Params:
        """Params of a model whose only decoder layer is that one."""
        decoder = {**self.outer["decoder"], "layers": self.layer(number)}
        return {**self.outer, "decoder": decoder}

    def inputs(self, arrays: dict[str, np.ndarray]) -> Inputs:
        """A processor's arrays, checked."""
        return as_inputs(arrays, self.config)


@functools.partial(jax.jit, static_argnames=("graphdef", "function"))
def apply(graphdef: nnx.GraphDef, params: Params, function: Callable[..., Any], *args: Any) -> Any:
    """Compiled ``function(module, *args)`` of the module that holds the params."""
    return function(merge(graphdef, params), *args)


def one_layer(config: Any, number: int) -> Any:
    """The config of a model whose only decoder layer is that one."""
    windows = None if config.text.windows is None else config.text.windows[number : number + 1]
    return dataclasses.replace(config, text=dataclasses.replace(config.text, num_layers=1, windows=windows))


def _graphdefs(config: Any, module: Any, dtype: str, kept: str) -> Callable[[int], nnx.GraphDef]:
    """The structure of a model with one decoder layer, by that layer's number; layers alike share one."""

    @functools.cache
    def make(alone: Any) -> nnx.GraphDef:
        return make_skeleton(module, alone, dtype, kept)[0]

    return lambda number: make(one_layer(config, number))


def from_model(model: Model) -> Port:
    """The port of a model in memory."""
    layers = model.params["decoder"]["layers"]
    outer = {**model.params, "decoder": {k: v for k, v in model.params["decoder"].items() if k != "layers"}}
    flat = flatten(model.params)
    dtype = str(model.dtype)

    def read(leaf: str, number: int | None) -> np.ndarray:
        value = flat[leaf]
        return np.asarray(value if number is None else value[number])

    def layer(number: int) -> Params:
        return jax.tree.map(lambda leaf: leaf[number : number + 1], layers)

    kept = str(flat["decoder/embed/embedding"].dtype)
    graphdef = _graphdefs(model.config, model.family.module, dtype, kept)
    return Port(model.config, model.folder, model, outer, read, layer, graphdef, dtype)


def from_folder(path: str | Path, dtype: str, streamed: bool) -> Port:
    """The port of a checkpoint.

    Args:
      path: a Hugging Face folder, an Orbax store, or a name on the hub.
      dtype: what to compute in, and to keep weights in.
      streamed: hold one decoder layer at a time.

    Raises:
      JaxmllmError: as ``load`` does.
    """
    if not streamed:
        return from_model(load(path, dtype))
    folder = find_checkpoint(path)
    fields = checkpoint.read_json(folder / "config.json")
    family = family_of(fields)
    config = family.read_config(fields)
    _, skeleton = make_skeleton(family.module, config, dtype, dtype)
    weights = open_weights(folder, NAME_TABLES[fields["model_type"]](config), skeleton)
    return _streamed(folder, config, family.module, flatten(skeleton), weights, dtype)


def kept_type(weights: Weights, leaves: Iterable[str], dtype: str) -> str:
    """What weights are kept in where memory is short: the checkpoint's own type if that is narrower, which is exact."""
    narrow = [np.dtype(name) for name in {str(weights.dtype(leaf)) for leaf in leaves}]
    alike = len(narrow) == 1 and narrow[0].itemsize < np.dtype(dtype).itemsize
    return str(narrow[0]) if alike else dtype


def _streamed(folder: Path, config: Any, module: Any, shapes: dict[str, Any], weights: Weights, dtype: str) -> Port:
    kept = kept_type(weights, shapes, dtype)
    leaves = flatten(make_skeleton(module, config, dtype, kept)[1])

    def read(leaf: str, number: int | None) -> np.ndarray:
        region = tuple((0, size) for size in leaves[leaf].shape)
        if number is None:
            return weights.read(leaf, region, leaves[leaf].dtype)
        return weights.read(leaf, ((number, number + 1), *region[1:]), leaves[leaf].dtype)[0]

    outer = {leaf: jnp.asarray(read(leaf, None)) for leaf in leaves if not leaf.startswith(LAYERS)}
    inner = [leaf for leaf in leaves if leaf.startswith(LAYERS)]

    def layer(number: int) -> Params:
        trim()  # of the layer before
        return unflatten({leaf.removeprefix(LAYERS): jnp.asarray(read(leaf, number)[None]) for leaf in inner})

    graphdef = _graphdefs(config, module, dtype, kept)
    return Port(config, folder, None, unflatten(outer), read, layer, graphdef, dtype)
