"""Stated rules that name fusion layers and a review layer from masking curves.

The paper leaves the cut-offs open, so these rules are ours, and their cut-offs are arguments.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxmllm.errors import InputError

FUSION_SHARE = 0.10
# The file in a sweep's folder that names the fusion layers.
FUSION_FILE = "fusion.json"
REVIEW_FROM = 0.75
REVIEW_DROP = 0.01


def fusion_layers(erased: Float[np.ndarray, " L"], clean: float, share: float = FUSION_SHARE) -> list[int]:
    """Layers that read the image, from the curve of a score under erasure.

    ``erased[i]`` is the score with the image erased at the input of layer i, ``erased[L]`` the clean score. What layer
    i reads from the image is ``erased[i + 1] - erased[i]``. A layer is a fusion layer where that gain is at least
    ``share`` of the whole rise from ``erased[0]`` to clean.

    Args:
      erased: score (accuracy or log-probability) by layer.
      clean: the unedited score.
      share: cut-off, 0..1.

    Returns:
      Layer numbers in order; empty where erasing at layer 0 costs nothing.
    """
    curve = np.append(np.asarray(erased, float), clean)
    if curve.size < 2:
        raise InputError("fusion layers need the score of at least one layer")
    rise = clean - curve[0]
    if rise <= 0:
        return []
    return [int(layer) for layer in np.flatnonzero(np.diff(curve) >= share * rise)]


def review_layer(
    blinded: Float[np.ndarray, " L"], clean: float, drop: float = REVIEW_DROP, start: float = REVIEW_FROM
) -> int | None:
    """The review layer, from the curve of a score with one layer blinded: a late layer at which masking hurts again.

    Among layers from ``start`` of the depth on, the one with the largest drop from clean; it counts only where that
    drop is at least ``drop`` and larger than at the layer before, which is what makes it a return rather than a tail.

    Args:
      blinded: score (accuracy, 0..1) with layer i alone blinded.
      clean: the unedited score.
      drop: the smallest drop that counts.
      start: share of the depth from which layers are late.

    Returns:
      The layer, or ``None`` where no late layer qualifies.
    """
    drops = clean - np.asarray(blinded, float)
    first = max(1, int(np.ceil(start * drops.size)))
    if first >= drops.size:
        return None
    layer = first + int(np.argmax(drops[first:]))
    return layer if drops[layer] >= drop and drops[layer] > drops[layer - 1] else None


def fusion_record(erased: Float[np.ndarray, " L"], clean: float, share: float = FUSION_SHARE) -> dict[str, Any]:
    """The fusion layers with the rule that found them and what it was applied to, for ``fusion.json``."""
    return {
        "layers": fusion_layers(erased, clean, share),
        "num_layers": len(erased),
        "rule": "layer i counts where score[i + 1] - score[i] >= share * (clean - score[0]); score[i] is the accuracy "
        "with the image erased at the input of layer i, score[L] the clean one",
        "share": share,
        "erased": [float(score) for score in erased],
        "clean": float(clean),
    }


def read_fusion_layers(source: str | Path) -> tuple[int, ...]:
    """Fusion layers by hand (``2+4+8`` or ``2,4,8``), or of a file that ``jaxmllm sweep`` wrote (or its folder).

    Raises:
      InputError: neither; or the file names no layers.
    """
    if isinstance(source, str) and re.fullmatch(r"[0-9]+([+,][0-9]+)*", source):
        return tuple(int(layer) for layer in re.split(r"[+,]", source))
    path = Path(source)
    path = path / FUSION_FILE if path.is_dir() else path
    try:
        layers = json.loads(path.read_text(encoding="utf-8"))["layers"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{source}: no fusion layers ({error}); expected layers as in 2+4+8, or {FUSION_FILE} of a sweep's folder"
        ) from error
    if not isinstance(layers, list) or not layers or any(type(layer) is not int or layer < 0 for layer in layers):
        raise InputError(
            f"{path}: layers is {layers!r}; expected at least one whole number. Is the sweep's curve flat?"
        )
    return tuple(layers)
