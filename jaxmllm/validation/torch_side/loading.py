"""transformers' own models from a checkpoint's folder: whole, or streamed, a large stage of the model at a time.

Neither way uses this project's tables of names: tensors find their parameters by transformers' own rules.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import nn

from jaxmllm.convert.checkpoint import Header, open_tensors, read_headers, read_json, weight_files
from jaxmllm.errors import CheckpointError, ConfigError, InputError
from jaxmllm.validation.torch_side.anatomy import FAMILIES, Anatomy, find
from jaxmllm.validation.torch_side.ways import Promoted

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
PANEL = 2**24  # numbers that are compared at once


@dataclasses.dataclass(frozen=True)
class Reference:
    """A model of transformers' that computes with eager attention and without gradients.

    Attributes:
      model: in evaluation mode; streamed or not, ``model(...)`` and ``model.generate(...)`` give the same numbers.
      anatomy: its modules.
      folder: the checkpoint.
      dtype: what it computes in.
      rounded_to: the type that the weights were rounded to before; ``None`` where they are the file's.
      stages: what is streamed; none where the model is whole.
    """

    model: Any
    anatomy: Anatomy
    folder: Path
    dtype: str
    rounded_to: str | None
    stages: tuple[Stage, ...]

    @property
    def streamed(self) -> bool:
        """Whether large stages are read when they run."""
        return bool(self.stages)

    @contextlib.contextmanager
    def hold(self, module: nn.Module) -> Iterator[None]:
        """Keeps the weights of a module, so that they can be read; changes nothing where the model is whole.

        Args:
          module: any module of the model; all that is in it is kept.
        """
        inside = set(module.modules())
        with contextlib.ExitStack() as held:
            for stage in self.stages:
                if stage.module in inside or module in set(stage.module.modules()):
                    stage.take()
                    held.callback(stage.give_back)
            yield


@dataclasses.dataclass(frozen=True)
class Weight:
    """A parameter of a module and the tensor that it is read from."""

    owner: nn.Module
    attribute: str
    tensor: str
    header: Header
    rounded_to: torch.dtype
    dtype: torch.dtype

    def load(self) -> None:
        """Reads it."""
        with open_tensors(self.header.file) as tensors:
            value = _to_torch(tensors.get_tensor(self.tensor))
        self._put(value.to(self.rounded_to).to(self.dtype))

    def forget(self) -> None:
        """Puts a placeholder of the same shape in its place, which takes no memory and turns all it meets into NaN."""
        self._put(torch.full((), float("nan"), dtype=self.dtype).expand(self.header.shape))

    def _put(self, value: torch.Tensor) -> None:
        self.owner._parameters[self.attribute] = nn.Parameter(value, requires_grad=False)


class Stage:
    """A module whose weights are read when it runs and given back after. Whoever takes it, gives it back."""

    def __init__(self, module: nn.Module, weights: Iterable[Weight]):
        self.module = module
        self._weights = tuple(weights)
        self._takers = 0
        for weight in self._weights:
            weight.forget()
        module.register_forward_pre_hook(lambda *_: self.take())
        module.register_forward_hook(lambda *_: self.give_back(), always_call=True)

    def take(self) -> None:
        """Has the weights in memory until they are given back as often as they were taken."""
        if not self._takers:
            for weight in self._weights:
                weight.load()
        self._takers += 1

    def give_back(self) -> None:
        """The inverse of ``take``."""
        self._takers -= 1
        if not self._takers:
            for weight in self._weights:
                weight.forget()


def load_reference(folder: Path, dtype: str, streamed: bool = False, rounded_to: str | None = None) -> Reference:
    """Loads a checkpoint as transformers does.

    Args:
      folder: config.json and safetensors.
      dtype: what to compute in: ``float32``, ``bfloat16``, ``float16`` or ``float64``. A model in float64 is to be run
        in ``ways.computing("float64")``, or its norms and tables are float32 still.
      streamed: hold at most one large stage of the model at a time.
      rounded_to: round the weights to this type first, so that a model in a wider one has the very same.

    Raises:
      InputError: a type that is not known.
      ConfigError: the model is of no supported family.
      CheckpointError: files or tensors are missing, left over, broken or misshaped.
    """
    for name in (dtype, rounded_to or dtype):
        if name not in DTYPES:
            raise InputError(f"dtype is {name!r}; expected one of {', '.join(DTYPES)}")
    headers = read_headers(weight_files(folder))
    model_type = read_json(folder / "config.json").get("model_type")
    if model_type not in FAMILIES:
        raise ConfigError(
            f"{folder / 'config.json'}: model_type is {model_type!r}; expected one of {', '.join(FAMILIES)}"
        )
    stages: tuple[Stage, ...] = ()
    if streamed:
        model, stages = _load_streamed(folder, headers, dtype, rounded_to or dtype)
    else:
        model = _load_whole(folder, dtype, rounded_to or dtype)
    return Reference(model.eval().requires_grad_(False), find(model), folder, dtype, rounded_to, stages)


def _load_whole(folder: Path, dtype: str, rounded_to: str) -> Any:
    from transformers import AutoModelForImageTextToText

    loaded: Any = AutoModelForImageTextToText.from_pretrained(
        folder,
        dtype=DTYPES[dtype],
        attn_implementation="eager",
        local_files_only=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    model, found = loaded
    for name, shape, expected in found["mismatched_keys"]:
        raise CheckpointError(
            f"{folder}: the tensor of {name} has shape {tuple(shape)}; the config asks for {tuple(expected)}"
        )
    _check_names(folder, set(found["missing_keys"]) - unread(model), found["unexpected_keys"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(parameter.to(_kept_type(model, name, rounded_to)))
    if dtype == "float64":
        _make_buffers(model, dtype)
    return model


def _load_streamed(
    folder: Path, headers: Mapping[str, Header], dtype: str, rounded_to: str
) -> tuple[Any, tuple[Stage, ...]]:
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=DTYPES[dtype], attn_implementation="eager")
    _make_buffers(model, dtype)
    _read_generation_config(model, folder)
    sources = _sources(model, folder, headers)

    large, idle = _large(find(model)), unread(model)
    owners = {module: stage for stage in large for module in stage.modules()}
    of_stages: dict[nn.Module, list[Weight]] = {stage: [] for stage in large}
    for prefix, module in model.named_modules():
        for attribute in module._parameters:
            name = f"{prefix}.{attribute}" if prefix else attribute
            if name not in sources:
                if name in idle:  # it runs all the same
                    shape = module._parameters[attribute].shape
                    module._parameters[attribute] = nn.Parameter(torch.zeros(shape, dtype=DTYPES[dtype]))
                continue
            tensor = sources[name]
            weight = Weight(
                owner=module,
                attribute=attribute,
                tensor=tensor,
                header=headers[tensor],
                rounded_to=_kept_type(model, name, rounded_to),
                dtype=_kept_type(model, name, dtype),
            )
            if module in owners:
                of_stages[owners[module]].append(weight)
            else:
                weight.load()
    return model, tuple(Stage(stage, weights) for stage, weights in of_stages.items())


def _large(anatomy: Anatomy) -> list[nn.Module]:
    """The modules that are read when they run; what is in none of them is small and stays."""
    return [
        *anatomy.blocks,
        *anatomy.qformer_layers,
        anatomy.connector,
        anatomy.decoder.embed_tokens,
        *anatomy.layers,
        anatomy.head,
    ]


def _make_buffers(model: nn.Module, dtype: str) -> None:
    """Computes buffers anew, as their classes do: a model without weights has none, and float64 wants its own."""
    for module in model.modules():
        if not module._buffers:
            continue
        with Promoted() if dtype == "float64" else contextlib.nullcontext():
            made = type(module)(config=module.config)
        for name, buffer in made.named_buffers(recurse=False):
            module._buffers[name] = buffer


def _read_generation_config(model: Any, folder: Path) -> None:
    from transformers import GenerationConfig

    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)


def _kept_type(model: Any, name: str, dtype: str) -> torch.dtype:
    """The type that transformers keeps a parameter in: of a model of halves a few stay float32."""
    for pattern, kept in model._get_dtype_plan(DTYPES[dtype]).items():
        if re.search(rf"(^|\.){pattern}(\.|$)", name):
            return kept
    return DTYPES[dtype]


def _sources(model: Any, folder: Path, headers: Mapping[str, Header]) -> dict[str, str]:
    """The tensor that each parameter is read from, by transformers' own rules of renaming.

    Raises:
      CheckpointError: tensors are missing, left over, misshaped, or transformers would make them of several.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    wanted = dict(model.state_dict())
    sources: dict[str, str] = {}
    unexpected = []
    for tensor, header in headers.items():
        name, converter = rename_source_key(tensor, renamings, converters, model.base_model_prefix, wanted)
        if converter is not None:
            raise CheckpointError(f"{header.file}: {tensor} is not one parameter alone; load the model whole instead")
        if name not in wanted:
            unexpected.append(tensor)
        elif tuple(wanted[name].shape) != header.shape:
            raise CheckpointError(
                f"{header.file}: {tensor} has shape {header.shape}; the config asks for {tuple(wanted[name].shape)}"
            )
        else:
            sources[name] = tensor
    _tie(sources, model.all_tied_weights_keys, headers)
    _check_names(folder, set(wanted) - set(sources) - unread(model), unexpected)
    return sources


def unread(model: Any) -> set[str]:
    """Parameters that no logit depends on: what comes behind the vision layers that are read.

    Folders that were exported from a store lack them.
    """
    anatomy = find(model)
    behind = [*anatomy.blocks[anatomy.used_blocks :], getattr(anatomy.vision, "post_layernorm", None)]
    idle = {parameter for module in behind if module is not None for parameter in module.parameters()}
    if anatomy.vision_norm is not None:
        idle -= set(anatomy.vision_norm.parameters())
    return {name for name, parameter in model.named_parameters() if parameter in idle}


def _tie(sources: dict[str, str], tied: Mapping[str, str], headers: Mapping[str, Header]) -> None:
    """Lets tied parameters share a tensor; where a file holds both and they differ, each keeps its own."""
    for name, other in tied.items():
        both = name in sources and other in sources
        if both and not _equal(*((sources[each], headers[sources[each]]) for each in (name, other))):
            continue
        if other in sources:
            sources[name] = sources[other]
        elif name in sources:
            sources[other] = sources[name]


def _equal(one: tuple[str, Header], other: tuple[str, Header]) -> bool:
    """Whether two tensors hold the same numbers; a few rows at a time."""
    (name, header), (other_name, other_header) = one, other
    if header.shape != other_header.shape or header.dtype != other_header.dtype:
        return False
    length, rows = header.shape[0], max(1, PANEL // int(np.prod(header.shape[1:])))
    with open_tensors(header.file) as tensors, open_tensors(other_header.file) as other_tensors:
        a, b = tensors.get_slice(name), other_tensors.get_slice(other_name)
        return all(
            np.array_equal(a[start : min(start + rows, length)], b[start : min(start + rows, length)])
            for start in range(0, length, rows)
        )


# Buffers that older releases saved among the weights.
_SAVED_BUFFERS = re.compile(r"rotary_emb\.inv_freq$|(^|\.)position_ids$")


def _check_names(folder: Path, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Raises where weights and model do not cover each other."""
    left = sorted(name for name in unexpected if not _SAVED_BUFFERS.search(name))
    for what, names in (("the model lacks", sorted(missing)), ("no parameter takes", left)):
        if names:
            shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            raise CheckpointError(f"{folder}: {len(names)} tensors that {what}: {shown}; expected one for one")


def _to_torch(array: np.ndarray) -> torch.Tensor:
    """A tensor that shares an array's memory."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)
