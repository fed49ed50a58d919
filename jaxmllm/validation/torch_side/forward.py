"""A reference's components and their noise floors: one run with every layer watched, and runs in other ways.

A watched module's ``forward`` is wrapped, not hooked: inside it the weights of a streamed stage are in memory, so that
the layer can be run again, on the very same input, in the other ways.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from jaxmllm.validation.components import FAINT
from jaxmllm.validation.recording import Recorder
from jaxmllm.validation.torch_side.anatomy import (
    DECODER_PARTS,
    Anatomy,
    Parts,
    forward_arguments,
    patch_order,
    tensors_of,
)
from jaxmllm.validation.torch_side.loading import DTYPES, Reference, load_reference
from jaxmllm.validation.torch_side.ways import computing, type_of

Sites = dict[str, torch.Tensor]
Forward = Callable[..., Any]
# Runs a module by its forward on arguments; gives its output and the components that were seen, ``None`` where the call
# is not the one that is watched.
Read = Callable[[Forward, Sequence[Any], Mapping[str, Any]], tuple[Any, Sites | None]]
# Runs a step again, on the same input, in a way.
Again = Callable[[str], tuple[Any, Sites]]
Seen = Callable[["Step", Sites, Again], None]

# Components that the port starts from.
STARTS = ("vision.embed", "vision.features", "connector", "image_tokens", "embedding")


@dataclasses.dataclass(frozen=True)
class Step:
    """A part of a run that is watched.

    Attributes:
      modules: that run one after another, each on the output of the one before.
      read: runs the last of them and sees its components.
      rotary: the module that gives it its rotary tables; ``None`` where it has none.
      makes_tables: it is such a module.
    """

    modules: tuple[nn.Module, ...]
    read: Read
    rotary: nn.Module | None = None
    makes_tables: bool = False


Tables = dict[tuple[nn.Module, str], tuple[torch.Tensor, ...]]  # of a rotary module in a way


def record_components(
    recorder: Recorder,
    reference: Reference,
    folder: Path,
    ways: Sequence[str],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Records every component of a batch, and what the reference differs from itself by.

    Args:
      recorder: holds the batch; gets the components in the order in which they are computed.
      reference: the model.
      folder: its checkpoint, of which the run in a wider type reads the weights, a stage at a time.
      ways: see ``ways_for``; floors of the components' own and of whole runs in all of them.
      on_progress: is called with the watched parts that are done and how many there are.
    """
    steps = list(_steps(reference, recorder.inputs))
    anatomy = reference.anatomy
    depths = {"vision": anatomy.used_blocks, "qformer": len(anatomy.qformer_layers), "decoder": len(anatomy.layers)}
    starts = {*STARTS, *(f"{part}.{depth - 1}.resid_post" for part, depth in depths.items())}
    wide, *others = ways
    total, done = (2 + len(others)) * len(steps), 0
    tables: Tables = {}
    order = _order(reference.anatomy, recorder.inputs)

    def advance() -> None:
        nonlocal done
        done += 1
        on_progress(done, total)

    def record(step: Step, sites: Sites, again: Again) -> None:
        for name, tensor in sites.items():
            whole = name in starts or name.endswith("resid_pre")
            recorder.add(name, _array(tensor), whole=whole)
        for way in ways:
            output, again_seen = again(way)
            if step.makes_tables:
                windowed = order is not None and step.modules[0] is reference.anatomy.vision_rotary
                tables[step.modules[0], way] = tuple(table[order] for table in output) if windowed else output
            for name, tensor in again_seen.items():
                if not name.endswith("resid_pre"):
                    recorder.add_floor(name, "own", way, _array(tensor))
        recorder.flush()
        advance()

    def compare(way: str) -> Seen:
        def add(step: Step, sites: Sites, again: Again) -> None:
            for name, tensor in sites.items():
                recorder.add_floor(name, "run", way, _array(tensor))
            advance()

        return add

    _run(reference, recorder.inputs, steps, record, tables)
    for way in others:
        with computing(way):
            _run(reference, recorder.inputs, steps, compare(way), {})
    wider = load_reference(folder, type_of(wide, reference.dtype), streamed=True, rounded_to=reference.dtype)
    with computing(wide):
        _run(wider, recorder.inputs, list(_steps(wider, recorder.inputs)), compare(wide), {})


def _run(
    reference: Reference,
    inputs: Mapping[str, np.ndarray],
    steps: Sequence[Step],
    seen: Seen,
    tables: Tables,
) -> None:
    """Runs a model on a batch; ``seen`` is called with each step when it has run."""
    model = reference.model
    with torch.no_grad(), contextlib.ExitStack() as watched:
        for step in steps:
            watched.enter_context(_watched(step, reference.dtype, seen, tables))
        model(**tensors_of(inputs), **forward_arguments(model, inputs))


@contextlib.contextmanager
def _watched(step: Step, dtype: str, seen: Seen, tables: Tables) -> Iterator[None]:
    """Wraps the forwards of a step's modules."""
    first, last = step.modules[0], step.modules[-1]
    forwards = [module.forward for module in step.modules]
    called: list[tuple[Sequence[Any], Mapping[str, Any]]] = []

    def enter(*args: Any, **kwargs: Any) -> Any:
        called.append((args, kwargs))
        return forwards[0](*args, **kwargs)

    def chain(*args: Any, **kwargs: Any) -> Any:
        output = forwards[0](*args, **kwargs)
        for forward in forwards[1:]:
            output = forward(output)
        return output

    def leave(*args: Any, **kwargs: Any) -> Any:
        start = called.pop() if called else (args, kwargs)
        output, sites = step.read(forwards[-1], args, kwargs)
        if sites is not None:
            seen(step, sites, lambda way: _again(step, chain, start, way, dtype, tables))
        return output

    if first is not last:
        first.forward = enter
    last.forward = leave
    try:
        yield
    finally:
        for module in {first, last}:
            del module.forward


def _again(
    step: Step,
    forward: Forward,
    start: tuple[Sequence[Any], Mapping[str, Any]],
    way: str,
    dtype: str,
    tables: Tables,
) -> tuple[Any, Sites]:
    """Runs a step again, on the input that it had, in a way."""
    args, kwargs = start[0], dict(start[1])
    with contextlib.ExitStack() as inside:
        inside.enter_context(computing(way))
        if type_of(way, dtype) != dtype:
            wide = DTYPES[type_of(way, dtype)]
            inside.enter_context(_in_type(step.modules, wide))
            args, kwargs = _cast(args, wide), _cast(kwargs, wide)
            if step.makes_tables:
                # its frequencies are no parameters, but computed by its class
                forward = type(step.modules[0])(config=step.modules[0].config).forward
        if step.rotary is not None:
            kwargs["position_embeddings"] = tables[step.rotary, way]
        output, sites = step.read(forward, args, kwargs)
    return output, sites or {}


@contextlib.contextmanager
def _in_type(modules: Sequence[nn.Module], dtype: torch.dtype) -> Iterator[None]:
    """Has the parameters of modules in a type."""
    owners = {each for module in modules for each in module.modules()}
    kept = [(owner, name, value) for owner in owners for name, value in owner._parameters.items() if value is not None]
    try:
        for owner, name, value in kept:
            owner._parameters[name] = nn.Parameter(value.to(dtype), requires_grad=False)
        yield
    finally:
        for owner, name, value in kept:
            owner._parameters[name] = value


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Arguments with their tensors of floating point in a type."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        return type(value)(_cast(each, dtype) for each in value)
    if isinstance(value, dict):
        return {name: _cast(each, dtype) for name, each in value.items()}
    return value


def _array(tensor: torch.Tensor) -> np.ndarray:
    """As NumPy; halves become float32."""
    if tensor.is_floating_point() and tensor.dtype != torch.float64:
        tensor = tensor.float()
    return tensor.detach().numpy()


def _order(anatomy: Anatomy, inputs: Mapping[str, np.ndarray]) -> torch.Tensor | None:
    """See ``patch_order``."""
    return patch_order(anatomy, torch.from_numpy(inputs["image_grid_thw"])) if "image_grid_thw" in inputs else None


def _steps(reference: Reference, inputs: Mapping[str, np.ndarray]) -> Iterator[Step]:
    """What is watched of a run, in the order in which it runs."""
    anatomy = reference.anatomy
    if "pixel_values" in inputs:
        yield from _image_steps(anatomy, _order(anatomy, inputs))
    image = reference.model.config.image_token_id
    placeholders = torch.from_numpy(inputs["input_ids"] == image) if "pixel_values" in inputs else None
    yield Step((anatomy.rotary,), _read_rotary(placeholders), makes_tables=True)
    for index, layer in enumerate(anatomy.layers):
        yield Step((layer,), _read_layer(layer, f"decoder.{index}"), anatomy.rotary)
    yield Step((anatomy.decoder.norm,), _read_output("final_norm"))
    yield Step((anatomy.head,), _read_output("logits"))


def _image_steps(anatomy: Anatomy, order: torch.Tensor | None) -> Iterator[Step]:
    patches = None if order is None else torch.argsort(order)
    if anatomy.vision_rotary is not None:
        yield Step((anatomy.vision_rotary,), _read_nothing, makes_tables=True)
    yield Step(anatomy.vision_embedding, _read_output("vision.embed"))
    for index, block in enumerate(anatomy.blocks[: anatomy.used_blocks]):
        read = _read_block(block, f"vision.{index}", anatomy.block_parts, patches)
        yield Step((block,), read, anatomy.vision_rotary)
    if anatomy.vision_norm is not None:
        yield Step((anatomy.vision_norm,), _read_vision_norm)
    if anatomy.qformer is not None:
        yield Step((anatomy.qformer.embeddings,), _read_output("qformer.embed"))
    for index, layer in enumerate(anatomy.qformer_layers):
        yield Step((layer,), _read_qformer_layer(layer, f"qformer.{index}"))
    yield Step((anatomy.connector,), _read_connector(anatomy, order))


def _read_nothing(forward: Forward, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Sites]:
    return forward(*args, **kwargs), {}


def _read_output(name: str) -> Read:
    def read(forward: Forward, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Sites]:
        output = forward(*args, **kwargs)
        return output, {name: output}

    return read


def _read_vision_norm(forward: Forward, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Sites | None]:
    """The norm runs a second time, on the class tokens alone, which nothing reads."""
    output = forward(*args, **kwargs)
    return output, ({"vision.features": output} if output.ndim == 3 else None)


def _read_connector(anatomy: Anatomy, order: torch.Tensor | None) -> Read:
    """Projectors of the LLaVAs read the tower's output; image tokens of Qwen2.5-VL come sorted by windows."""
    reads_tower = anatomy.vision_norm is None and anatomy.vision_rotary is None

    def read(forward: Forward, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Sites]:
        output = forward(*args, **kwargs)
        tokens = output
        if order is not None:
            unit = len(order) // len(output)
            tokens = output[torch.argsort(order[::unit])]
        return output, ({"vision.features": args[0]} if reads_tower else {}) | {"connector": tokens}

    return read


def _read_rotary(placeholders: torch.Tensor | None) -> Read:
    """What the decoder starts from is seen here, since its rotary module is called first and on its input."""

    def read(forward: Forward, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Sites]:
        hidden, positions = args[0], kwargs["position_ids"] if "position_ids" in kwargs else args[1]
        cosines, sines = forward(*args, **kwargs)
        sites = {} if placeholders is None else {"image_tokens": hidden[placeholders]}
        if positions.ndim == 3:
            # without images the three axes are one
            positions = positions[0] if placeholders is None else positions.movedim(0, -1)
        positions = positions.expand(*hidden.shape[:2], *positions.shape[2:])
        rotary = torch.cat([cosines, sines], dim=-1).expand(*hidden.shape[:2], -1)
        return (cosines, sines), sites | {"positions": positions, "rotary": rotary, "embedding": hidden}

    return read


class _KeysAndValues:
    """Stands in for a layer's cache, and keeps what the layer would store."""

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys, self.values = keys, values
        return keys, values


def _read_layer(layer: Any, name: str) -> Read:
    def read(forward: Forward, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Sites]:
        stored = _KeysAndValues()
        cache = "cache" if "cache" in kwargs else "past_key_values"
        with _seen(layer, DECODER_PARTS) as seen:
            output = forward(*args, **{**kwargs, cache: stored})
        return output, {
            f"{name}.resid_pre": args[0],
            f"{name}.attn_in": seen["attn_in"],
            f"{name}.attn_in~faint": seen["attn_in~faint"],
            f"{name}.keys": stored.keys.transpose(1, 2),
            f"{name}.values": stored.values.transpose(1, 2),
            f"{name}.attn_probs": seen["attn_probs"],
            f"{name}.attn_out": seen["attn_out"],
            f"{name}.resid_mid": seen["resid_mid"],
            f"{name}.mlp_in": seen["mlp_in"],
            f"{name}.mlp_in~faint": seen["mlp_in~faint"],
            f"{name}.mlp_out": seen["mlp_out"],
            f"{name}.resid_post": output[0] if isinstance(output, tuple) else output,
        }

    return read


def _read_block(block: Any, name: str, parts: Parts, patches: torch.Tensor | None) -> Read:
    def read(forward: Forward, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Sites]:
        with _seen(block, parts) as seen:
            output = forward(*args, **kwargs)
        sites = ("attn_in", "attn_in~faint", "attn_out", "mlp_in", "mlp_in~faint", "mlp_out")
        found = {"resid_pre": args[0]} | {site: seen[site] for site in sites} | {"resid_post": output}
        return output, {
            f"{name}.{site}": tensor if patches is None else tensor[patches] for site, tensor in found.items()
        }

    return read


def _read_qformer_layer(layer: Any, name: str) -> Read:
    def read(forward: Forward, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Sites]:
        found: Sites = {f"{name}.resid_pre": args[0]}
        with contextlib.ExitStack() as hooks:
            hooks.enter_context(_hook(layer.attention, lambda _, out: found.update({f"{name}.attn_out": out})))
            if layer.has_cross_attention:
                hooks.enter_context(
                    _hook(layer.crossattention, lambda _, out: found.update({f"{name}.cross_out": out}))
                )
            output = forward(*args, **kwargs)
        return output, found | {f"{name}.resid_post": output}

    return read


@contextlib.contextmanager
def _seen(layer: Any, parts: Parts) -> Iterator[Sites]:
    """Gathers the sites of a transformer layer while it runs."""
    seen: Sites = {}
    attention_norm, attention, mlp_norm, mlp = (getattr(layer, part) for part in dataclasses.astuple(parts))

    def norm(module: nn.Module, site: str) -> Callable[[Sequence[Any], Any], None]:
        def note(args: Sequence[Any], output: torch.Tensor) -> None:
            seen[site] = output
            seen[f"{site}~faint"] = module.forward(args[0] * FAINT)

        return note

    def attended(_: Sequence[Any], output: Any) -> None:
        seen["attn_out"], *weights = output if isinstance(output, tuple) else (output,)
        if weights:
            seen["attn_probs"] = weights[0]

    with (
        _hook(attention_norm, norm(attention_norm, "attn_in")),
        _hook(attention, attended),
        _hook(mlp_norm, norm(mlp_norm, "mlp_in")),
        _hook(mlp_norm, lambda args, _: seen.update(resid_mid=args[0])),
        _hook(mlp, lambda _, output: seen.update(mlp_out=output)),
    ):
        yield seen


@contextlib.contextmanager
def _hook(module: nn.Module, note: Callable[[Sequence[Any], Any], None]) -> Iterator[None]:
    """Calls ``note`` with a module's arguments and output whenever it has run."""
    handle = module.register_forward_hook(lambda _, args, output: note(args, output))
    try:
        yield
    finally:
        handle.remove()
