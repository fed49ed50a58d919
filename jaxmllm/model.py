"""A loaded multimodal LLM: params, the pure functions over them, and its processor."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jaxmllm import processing
from jaxmllm.analysis.geometry import ImageTokens, geometry
from jaxmllm.convert import checkpoint, export, store, streaming
from jaxmllm.convert.names import NameTable
from jaxmllm.convert.pieces import ConversionPlan, conversion_plan
from jaxmllm.convert.tables import NAME_TABLES
from jaxmllm.decoding.stopping import Endings, read_endings
from jaxmllm.errors import CheckpointError, InputError
from jaxmllm.models import forward as pure
from jaxmllm.models import sharding
from jaxmllm.models.capture import Capture
from jaxmllm.models.edits import Edits
from jaxmllm.models.inputs import Inputs, as_inputs
from jaxmllm.models.layers import Builder
from jaxmllm.models.registry import Family, family_named, family_of

DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A multimodal LLM.

    Attributes:
      config: the family's frozen config.
      graphdef: static structure of the family's NNX module.
      params: nested dict of arrays; the first argument of ``forward``, so that it can be traced, cast or placed.
      folder: where the checkpoint came from; holds the processor files.
      mesh: the devices that hold the params, with axes ``data`` and ``model``; ``None`` where that is one device.
    """

    config: Any
    graphdef: nnx.GraphDef
    params: pure.Params
    folder: Path
    mesh: Mesh | None = None

    @property
    def family(self) -> Family:
        """What the library knows of the model's family."""
        return family_named(self.config.model_type)

    @property
    def num_layers(self) -> int:
        """Decoder layers, L."""
        return self.config.text.num_layers

    @property
    def num_heads(self) -> int:
        """Query heads of a decoder layer, H."""
        return self.config.text.num_heads

    @functools.cached_property
    def dtype(self) -> jnp.dtype:
        """What the model computes in."""

        def embed(params: pure.Params) -> Array:
            return pure.merge(self.graphdef, params).decoder.embed(jnp.zeros((1, 1), jnp.int32))

        return jax.eval_shape(embed, self.params).dtype

    @functools.cached_property
    def processor(self) -> Any:
        """The checkpoint's Hugging Face processor, read on first use.

        Raises:
          ProcessorError: naming the files that are missing.
        """
        return processing.load_processor(self.folder, self.config)

    @functools.cached_property
    def endings(self) -> Endings:
        """The tokens that end an answer; see ``jaxmllm.decoding.stopping``."""
        return read_endings(self.folder, self.config.model_type)

    def prepare(
        self,
        images: Sequence[processing.ImageLike | Sequence[processing.ImageLike]],
        questions: Sequence[str],
        padding_side: str | None = None,
    ) -> dict[str, np.ndarray]:
        """Model inputs for images and questions; see ``jaxmllm.processing.prepare``."""
        return processing.prepare(self.processor, images, questions, padding_side)

    def as_inputs(self, inputs: Mapping[str, Any] | Inputs, bucketed: bool = False) -> Inputs:
        """Checks a processor's arrays; see ``jaxmllm.models.inputs.as_inputs``.

        With ``bucketed``, sequences and images are padded to a few sizes, so that unlike inputs share programs.
        """
        return inputs if isinstance(inputs, Inputs) else as_inputs(inputs, self.config, bucketed)

    def forward(
        self,
        params: pure.Params,
        inputs: Mapping[str, Any] | Inputs,
        *,
        edits: Edits | None = None,
        capture: Capture | None = None,
        logits_at: pure.LogitsAt = "all",
    ) -> pure.Output:
        """One forward pass: a pure function, to be called as it is or under ``jit``, ``vmap`` and ``grad``.

        Args:
          params: ``model.params``, or a pytree like it.
          inputs: what ``prepare`` or a Hugging Face processor returns: ``input_ids`` and ``attention_mask`` ``[B, S]``
            (padding on either side), ``pixel_values`` and what else the family has of images, optionally
            ``position_ids``; or what ``as_inputs`` made of it.
          edits: interventions, from ``jaxmllm.analysis``; ``None`` runs the clean model.
          capture: what to keep on the way; see ``Capture``.
          logits_at: positions of the logits: ``all``, the ``last`` prompt token, the ``answer`` positions, or indices
            ``[B, R]``.

        Returns:
          ``Output(logits, captured)``; logits are float32 ``[B, R, V]``. On a mesh, B is laid along ``data``.

        Raises:
          InputError: arrays, layers or rows that do not fit the model.
        """
        checked = sharding.put_rows(self.as_inputs(inputs), self.mesh)
        if edits is not None:
            edits.check(self.num_layers)
        capture = capture or Capture()
        if isinstance(logits_at, str):
            if logits_at not in ("all", "last", "answer"):
                raise InputError(
                    f"logits_at is {logits_at!r}; expected 'all', 'last', 'answer' or positions of shape (batch, rows)"
                )
            with sharding.context(self.mesh):
                return pure.forward_named(self.graphdef, params, checked, edits, capture, logits_at)
        with sharding.context(self.mesh):
            return pure.forward_at(self.graphdef, params, checked, edits, capture, jnp.asarray(logits_at))

    def encode_images(self, params: pure.Params, inputs: Mapping[str, Any] | Inputs) -> Float[Array, "I N D"]:
        """Image tokens as the decoder receives them: vision tower and connector.

        Args:
          params: ``model.params``, or a pytree like it.
          inputs: as for ``forward``; of a mapping only what describes images is read.

        Returns:
          One row of features a token. Where images take unlike numbers of tokens, N is the largest, and what is past an
          image's own number means nothing.

        Raises:
          InputError: there are no images, or they do not fit the model.
        """
        if isinstance(inputs, Inputs):
            images = inputs.images
        else:
            images = self.family.pack_images(self.config, inputs, lambda size: size)
        if images is None:
            raise InputError(f"inputs hold no images; expected {', '.join(self.family.image_inputs)}")
        with sharding.context(self.mesh):
            return pure.encode_images(self.graphdef, params, sharding.put_rows(images.arrays, self.mesh))

    def geometry(
        self, inputs: Mapping[str, Any], image_sizes: Sequence[tuple[int, int]] | None = None
    ) -> list[ImageTokens]:
        """Where each image's tokens stand and what they saw; see ``jaxmllm.analysis.geometry``."""
        return geometry(self, inputs, image_sizes)


def load(path: str | Path, dtype: str = "float32", param_dtype: str | None = None, mesh: Mesh | None = None) -> Model:
    """Loads a multimodal LLM.

    Args:
      path: a Hugging Face checkpoint folder, an Orbax store written by ``jaxmllm convert``, or a name on the hub
        (``org/name``).
      dtype: what the model computes in: ``float32``, ``bfloat16`` or ``float16``. Norms' statistics, softmax, rotary
        angles and logits are float32 in any case.
      param_dtype: what the weights are kept in; by default ``dtype``.
      mesh: devices to lay the model over, with axes ``data`` and ``model`` (``jaxmllm.parallel.mesh``); each process
        reads only the parts of the weights that its devices hold. ``None`` for the default device.

    Raises:
      ConfigError: a config that is missing or asks for what is not implemented.
      CheckpointError: weights that are missing, broken, left over or misshaped, all listed.
    """
    for name in (dtype, param_dtype or dtype):
        if name not in DTYPES:
            raise InputError(f"dtype is {name!r}; expected one of {', '.join(DTYPES)}")
    folder = find_checkpoint(path)
    fields = checkpoint.read_json(folder / "config.json")
    family = family_of(fields)
    config = family.read_config(fields)
    graphdef, skeleton = make_skeleton(family.module, config, dtype, param_dtype or dtype)
    shardings = None if mesh is None else sharding.param_shardings(skeleton, config, mesh)
    if store.is_store(folder):
        params = store.read_store(folder, skeleton, shardings=shardings)
    else:
        table = NAME_TABLES[fields["model_type"]](config)
        params = checkpoint.read_params(folder, table, skeleton, shardings=shardings)
    return Model(config, graphdef, params, folder, mesh)


def make_skeleton(
    module: Callable[[Any, Builder], nnx.Module], config: Any, dtype: str, param_dtype: str
) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """A family's structure and the shapes of its params, without memory or arithmetic."""

    def build() -> nnx.Module:
        return module(config, Builder(jnp.dtype(dtype), jnp.dtype(param_dtype), nnx.Rngs(0)))

    return pure.split(nnx.eval_shape(build))


def find_checkpoint(path: str | Path) -> Path:
    """The local folder of a checkpoint; a name on the hub is fetched through huggingface_hub's cache.

    Raises:
      CheckpointError: no such folder, or the hub cannot be reached.
    """
    folder = Path(path)
    if folder.is_dir():
        return folder
    name = str(path)
    looks_like_hub = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if folder.exists() or not looks_like_hub:
        raise CheckpointError(
            f"{path}: not a folder; expected a checkpoint folder, an Orbax store, or org/name on the hub"
        )
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.safetensors.index.json", "config.json", *store.PROCESSOR_FILES]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub's client and its transport raise many kinds
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{name}: no such folder here, and it cannot be fetched from the hub ({first}). "
            "Check the name and the connection, or give the path of a downloaded folder."
        ) from error


def convert_checkpoint(
    source: str | Path,
    destination: str | Path,
    param_dtype: str | None = None,
    on_progress: streaming.Progress = lambda done, total: None,
) -> None:
    """Writes a checkpoint as an Orbax store with its config and processor files; ``load`` reads that too.

    It is read, written and checked piece by piece. A conversion that was stopped goes on when called again; until it is
    whole, its work lies in ``.NAME.partial`` beside the destination.

    Args:
      source: a Hugging Face folder, a store, or a name on the hub.
      destination: a folder that does not exist yet; it appears whole or not at all.
      param_dtype: dtype of the stored weights; by default the one that ``config.json`` names, else float32.
      on_progress: told of bytes done, and of all bytes.

    Raises:
      JaxmllmError: as ``load`` and ``jaxmllm.convert.streaming.write_store`` do.
    """
    folder = find_checkpoint(source)
    streaming.refuse_existing(Path(destination))
    table, skeleton = _names_and_skeleton(folder, param_dtype)
    streaming.write_store(folder, Path(destination), table, skeleton, on_progress)


def plan_conversion(source: str | Path, param_dtype: str | None = None) -> ConversionPlan:
    """What ``convert_checkpoint`` will do, from ``config.json`` alone.

    Raises:
      JaxmllmError: as ``load`` does for the config.
    """
    return conversion_plan(*_names_and_skeleton(find_checkpoint(source), param_dtype))


def export_checkpoint(
    source: str | Path,
    destination: str | Path,
    dtype: str | None = None,
    on_progress: streaming.Progress = lambda done, total: None,
) -> tuple[str, ...]:
    """Writes a Hugging Face folder that ``transformers`` loads; see ``jaxmllm.convert.export.write_folder``.

    Args:
      source: a store, a Hugging Face folder, or a name on the hub.
      destination: a folder that does not exist yet; it appears whole or not at all.
      dtype: of the written weights; by default that of the source.
      on_progress: told of bytes done, and of all bytes.

    Returns:
      What the folder lacks, in words; empty where it has every tensor of its source.

    Raises:
      JaxmllmError: as ``load`` does; or the destination exists or cannot be written.
    """
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    folder = find_checkpoint(source)
    streaming.refuse_existing(Path(destination))
    table, skeleton = _names_and_skeleton(folder, "float32")
    return export.write_folder(folder, Path(destination), table, skeleton, dtype, on_progress)


def _names_and_skeleton(folder: Path, param_dtype: str | None) -> tuple[NameTable, dict[str, Any]]:
    """A checkpoint's table of names and the shapes of its params, in a dtype or in the one that its config names."""
    fields = checkpoint.read_json(folder / "config.json")
    family = family_of(fields)
    config = family.read_config(fields)
    if param_dtype is None:
        named = fields.get("dtype") or fields.get("torch_dtype")
        param_dtype = named if named in DTYPES else "float32"
    if param_dtype not in DTYPES:
        raise InputError(f"dtype is {param_dtype!r}; expected one of {', '.join(DTYPES)}")
    _, skeleton = make_skeleton(family.module, config, "float32", param_dtype)
    return NAME_TABLES[fields["model_type"]](config), skeleton
