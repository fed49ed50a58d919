"""Hypotheses of what enters a vision tower's first block, and of the features that are read of the tower."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np

from jaxmllm.validation.components import other_rows
from jaxmllm.validation.diagnosis.attention_parts import linear_of
from jaxmllm.validation.diagnosis.case import Case
from jaxmllm.validation.diagnosis.hypotheses import Change, Study, Variation, study
from jaxmllm.validation.diagnosis.norms import norm_changes, norm_of
from jaxmllm.validation.diagnosis.parts import Linear, Norm, rounding
from jaxmllm.validation.diagnosis.sample import draw
from jaxmllm.validation.diagnosis.vision import epsilon_of, few_pictures, is_qwen

_EMBED = "jaxmllm.models.vision.patchify; vision/patch_embed/kernel"
_PLACES = "vision/position_embed; the sum with the position embedding"
_CLASS = "vision/class_embed"


@dataclasses.dataclass(frozen=True)
class Patches:
    """Pixels of patches through one linear map.

    Attributes:
      pixels: ``[I, P, ...]``, a patch's pixels with the axes that ``axes`` names, in the kernel's order.
      linear: from pixels.
      order: axes of a patch's pixels as they are laid out.
      grid: rows and columns of patches, where pictures are square; ``by_columns`` numbers them column by column.
    """

    pixels: np.ndarray
    axes: tuple[str, ...]
    linear: Linear
    order: tuple[int, ...]
    grid: tuple[int, int] | None = None
    by_columns: bool = False

    @cached_property
    def array(self) -> np.ndarray:
        """``[I, P, D]``."""
        pixels = self.pixels.transpose(0, 1, *(2 + axis for axis in self.order))
        embedded = self.linear(pixels.reshape(*self.pixels.shape[:2], -1).astype(np.float64))
        if not self.by_columns or self.grid is None:
            return embedded
        split = embedded.reshape(len(embedded), *self.grid, -1)
        return split.swapaxes(1, 2).reshape(embedded.shape)


@dataclasses.dataclass(frozen=True)
class Embedding:
    """Patches, class token and position embedding, with a norm where there is one.

    Attributes:
      class_at: ``first``, ``last`` or ``none``: where the class token stands, if there is one.
      shift: by how many rows the position embedding is moved.
      by_columns: the position embedding's grid is transposed.
    """

    patches: Patches
    class_token: np.ndarray | None = None
    position: np.ndarray | None = None
    norm: Norm | None = None
    class_at: str = "first"
    shift: int = 0
    by_columns: bool = False

    def __call__(self) -> np.ndarray:
        hidden = self.patches.array
        if self.class_token is not None and self.class_at != "none":
            token = np.broadcast_to(self.class_token, (len(hidden), 1, hidden.shape[-1]))
            both = [token, hidden] if self.class_at == "first" else [hidden, token]
            hidden = np.concatenate(both, axis=1)
        if self.position is not None:
            hidden = hidden + self._positions()[: hidden.shape[1]]
        return hidden if self.norm is None else dataclasses.replace(self.norm, x=hidden)()

    def _positions(self) -> np.ndarray:
        assert self.position is not None
        position = np.roll(self.position, self.shift, axis=0)
        if not self.by_columns or self.patches.grid is None:
            return position
        grid = position[1:].reshape(*self.patches.grid, -1).swapaxes(0, 1)
        return np.concatenate([position[:1], grid.reshape(-1, position.shape[-1])])


def _patched(name: str, where: str, change: Callable[[Patches], Patches | None], **more: Any) -> Change:
    """A change of the patches."""

    def apply(part: Embedding) -> Embedding | None:
        patches = change(part.patches)
        return None if patches is None else dataclasses.replace(part, patches=patches)

    return Change(name, apply, where, **more)


def _mapped(change: Callable[[Linear], Linear | None]) -> Callable[[Patches], Patches | None]:
    def apply(part: Patches) -> Patches | None:
        linear = change(part.linear)
        return None if linear is None else dataclasses.replace(part, linear=linear)

    return apply


def _shifted(by: int) -> Callable[[Embedding], Embedding | None]:
    return lambda part: None if part.position is None else dataclasses.replace(part, shift=by)


EMBED_CHANGES = (
    Change(
        "class token missing",
        lambda part: (
            None if part.class_token is None else dataclasses.replace(part, class_token=np.zeros_like(part.class_token))
        ),
        _CLASS,
    ),
    Change(
        "class token last",
        lambda part: None if part.class_token is None else dataclasses.replace(part, class_at="last"),
        _CLASS,
    ),
    Change(
        "position embedding missing",
        lambda part: None if part.position is None else dataclasses.replace(part, position=None),
        _PLACES,
    ),
    *(
        Change(
            f"position embedding off by one ({word})",
            _shifted(by),
            _PLACES,
        )
        for by, word in ((1, "each place has that of the place before"), (-1, "each place has that of the place after"))
    ),
    Change(
        "position embedding with its grid transposed",
        lambda part: None if part.position is None else dataclasses.replace(part, by_columns=True),
        _PLACES,
        both_ways=True,
    ),
    _patched(
        "patches column by column (grid transposed)",
        _EMBED,
        lambda part: None if part.grid is None else dataclasses.replace(part, by_columns=True),
    ),
    _patched("patch embedding bias dropped", "vision/patch_embed/bias", _mapped(lambda linear: linear.without_bias)),
    Change(
        "norm before the first block missing",
        lambda part: None if part.norm is None else dataclasses.replace(part, norm=None),
        "vision/pre_norm",
    ),
    *(
        _patched(
            f"patch embedding: product of operands rounded to {kind}",
            "matmul precision",
            _mapped(rounding(kind)),
        )
        for kind in ("bfloat16", "float16", "tf32")
    ),
)


def _pixel_orders(part: Embedding) -> list[Change]:
    """Other orders of the pixels of a patch, where its axes are as long as they have to be."""
    patches = part.patches
    orders = [order for order in itertools.permutations(patches.order) if order != patches.order]
    return [
        _patched(
            f"pixels of a patch in the order {', '.join(patches.axes[axis] for axis in order)}",
            _EMBED,
            lambda patches, order=order: dataclasses.replace(patches, order=order),  # type: ignore[misc]
        )
        for order in orders
    ]


def embed_study(case: Case) -> Study | None:
    """Hypotheses of ``vision.embed``; ``None`` where what it starts from is not at hand."""
    whole = _qwen_embedding(case) if is_qwen(case.config) else _square_embedding(case)
    if whole is None:
        return None
    chosen = few_pictures(case)
    if chosen is not case:
        gap = np.abs(case.got.astype(np.float64) - case.expected).sum(axis=(1, 2))
        worst = np.sort(np.argsort(-np.nan_to_num(gap, nan=np.inf), kind="stable")[: len(chosen.got)])
        patches = dataclasses.replace(whole.patches, pixels=whole.patches.pixels[worst])
        whole = dataclasses.replace(whole, patches=patches)
    sample = draw(chosen)
    changes: tuple[Change, ...] = (*EMBED_CHANGES, *_pixel_orders(whole))
    if whole.norm is not None:
        inner = norm_changes(whole.norm, sample, epsilon_of(case.config)[2])
        changes = (*changes, *(_in_norm(change) for change in inner if change.name != "no norm at all"))
    return study(sample, whole, changes, lambda part: sample.rows_of(part()))


def _in_norm(change: Change) -> Change:
    """A change of the norm before the first block; there is one."""

    def apply(part: Embedding) -> Embedding | None:
        norm = change.apply(part.norm)
        return None if norm is None else dataclasses.replace(part, norm=norm)

    return dataclasses.replace(change, apply=apply)


def _square_embedding(case: Case) -> Embedding | None:
    """CLIP's and EVA's."""
    linear, vision = linear_of(case, "vision/patch_embed"), case.config.vision
    token, position = case.leaf("vision/class_embed"), case.leaf("vision/position_embed")
    if linear is None or token is None or position is None:
        return None
    pixels = _pictures(case)
    side, grid = vision.patch_size, vision.grid
    cut = pixels[:, :, : grid * side, : grid * side].reshape(len(pixels), -1, grid, side, grid, side)
    patches = cut.transpose(0, 2, 4, 3, 5, 1).reshape(len(pixels), grid**2, side, side, -1)
    width = linear.kernel.shape[1]
    norm = norm_of(case, np.zeros((1, width)), "vision/pre_norm", vision.layer_norm_eps, True)
    return Embedding(
        Patches(patches, ("row", "column", "channel"), linear, (0, 1, 2), (grid, grid)),
        token.reshape(-1).astype(np.float64),
        position.reshape(-1, width).astype(np.float64),
        norm,
    )


def _pictures(case: Case) -> np.ndarray:
    """Pictures ``[I, C, Y, X]``; of LLaVA-NeXT the tiles of all images, padding left out."""
    pixels = np.asarray(case.inputs["pixel_values"])
    if pixels.ndim == 4:
        return pixels
    counts = [case.config.tiling((int(y), int(x))).num_tiles for y, x in np.asarray(case.inputs["image_sizes"])]
    return np.concatenate([tiles[:count] for tiles, count in zip(pixels, counts, strict=True)])


def _qwen_embedding(case: Case) -> Embedding | None:
    linear, vision = linear_of(case, "vision/patch_embed"), case.config.vision
    if linear is None:
        return None
    shape = (vision.num_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    pixels = np.asarray(case.inputs["pixel_values"]).reshape(1, -1, *shape)
    return Embedding(Patches(pixels, ("channel", "time", "row", "column"), linear, (0, 1, 2, 3)))


def features_study(case: Case) -> Study | None:
    """Hypotheses of ``vision.features``: which block is read, and what is done to it."""
    if hasattr(case.config, "feature_layers"):
        return _read_layers(case)
    return _post_norm(case)


def _state(case: Case, layer: int) -> np.ndarray | None:
    """Hidden state ``layer`` of the tower, all rows: 0 is what enters block 0."""
    if layer == 0:
        return case.read("vision.embed")
    whole = case.read(f"vision.{layer}.resid_pre")
    if whole is not None:
        return whole
    array = case.read(f"vision.{layer - 1}.resid_post")
    return array if array is None or other_rows(array.shape) is None else None


def _read_layers(case: Case) -> Study | None:
    """LLaVA's: outputs of some blocks side by side, with or without the class token."""
    layers, keep = tuple(case.config.feature_layers), bool(case.config.keep_class_token)
    case = few_pictures(case)
    sample = draw(case)

    def read(layers: tuple[int, ...], rows: slice, add: int = 0) -> np.ndarray | None:
        states = [_state(case, layer + add) for layer in layers]
        if any(state is None for state in states):
            return None
        cut = [state[:, rows] for state in states if state is not None]
        if cut[0].shape[1] <= sample.positions.max():
            return None
        return np.concatenate([sample.rows_of(state) for state in cut], axis=-1)

    rows = slice(None) if keep else slice(1, None)
    plain = read(layers, rows)
    if plain is None:
        return None
    where = "config: feature_layers (vision_feature_layer); jaxmllm.models.vision.VisionTower"
    changes: list[tuple[str, str, Callable[[], np.ndarray | None]]] = [
        (
            f"feature layer {abs(add)} block(s) {'later' if add > 0 else 'earlier'}",
            where,
            functools.partial(read, layers, rows, add),
        )
        for add in sorted(range(-max(layers), 4), key=abs)
        if add
    ]
    if len(layers) > 1:
        orders = list(itertools.permutations(layers))[1:]
        changes += [
            (f"feature layers in the order {', '.join(map(str, order))}", where, lambda order=order: read(order, rows))  # type: ignore[misc]
            for order in orders
        ]
    kept = "config: keep_class_token (vision_feature_select_strategy); jaxmllm.models.llava.Llava.vision_features"
    other = slice(1, None) if keep else slice(None)
    last = slice(None, -1) if not keep else slice(None)
    changes += [
        (f"class token {'dropped' if keep else 'kept'}: rows are moved by one", kept, lambda: read(layers, other)),
        ("the last patch dropped instead of the class token", kept, lambda: read(layers, last)),
    ]
    variations = tuple(Variation(Change(name, lambda part: part, where), compute) for name, where, compute in changes)
    return Study(sample, lambda: plain, variations)


def _post_norm(case: Case) -> Study | None:
    """EVA's: the last block's output, normed."""
    case = few_pictures(case)
    count, vision = case.config.vision.num_layers, case.config.vision
    sample = draw(case)

    def of(layer: int) -> Norm | None:
        state = _state(case, layer)
        x = None if state is None else sample.rows_of(state)
        return None if x is None else norm_of(case, x, "vision/post_norm", vision.layer_norm_eps, True)

    part = of(count)
    if part is None:
        return None
    found = study(sample, part, norm_changes(part, sample, epsilon_of(case.config)[2]))

    def early(layer: int) -> np.ndarray | None:
        norm = of(layer)
        return None if norm is None else norm()

    others = tuple(
        Variation(
            Change(f"feature layer: read after block {layer - 1}", lambda part: part, "jaxmllm.models.eva.EvaTower"),
            lambda layer=layer: early(layer),  # type: ignore[misc]
        )
        for layer in range(count - 1, -1, -1)
    )
    return dataclasses.replace(found, variations=(*found.variations, *others))
