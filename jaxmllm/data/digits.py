"""Handwritten digits to draw in scenes: scikit-learn's bundled ones, split into training and test samples.

The test samples also come with the package, so that scenes with digits no model was trained on need no scikit-learn.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from jaxmllm.errors import InputError

BITMAP_SIDE = 8
INK = 16  # the most that a pixel of the original bitmaps has
# The samples of load_digit_bitmaps("test"), in their order; scripts/make_demo_digits.py writes the file.
HELD_OUT = Path(__file__).parent.parent / "demo" / "digits.npz"
HALVES = ("validation", "test")


@dataclass(frozen=True, eq=False)
class DigitBitmaps:
    """Handwritten digits: `images` [n, 8, 8] float ink from 0 to 1, `labels` [n] int from 0 to 9.

    Raises InputError when the shapes disagree, a label is no digit, a digit is missing or an image has no ink.
    """

    images: NDArray[np.float32]
    labels: NDArray[np.int64]

    def __post_init__(self) -> None:
        if self.images.shape != (len(self.labels), BITMAP_SIDE, BITMAP_SIDE):
            raise InputError(f"images must be [{len(self.labels)}, 8, 8] to match labels, got {self.images.shape}")
        if set(np.unique(self.labels).tolist()) != set(range(10)):
            raise InputError("labels must hold every digit from 0 to 9 and nothing else")
        if self.images.min() < 0 or self.images.max() > 1 or self.images.max(axis=(1, 2)).min() <= 0:
            raise InputError("every image must hold ink, between 0 and 1")


def load_digit_bitmaps(split: str) -> DigitBitmaps:
    """The handwritten digits that come with scikit-learn, 80% of every class in "train", the rest in "test".

    The split is by sample and always the same, so the digits of a held-out scene are never drawn in training.
    Raises InputError for another split, ImportError when scikit-learn is not installed.
    """
    if split not in ("train", "test"):
        raise InputError(f"split must be 'train' or 'test', got {split!r}")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the handwritten digits come with scikit-learn: pip install 'jaxmllm[scenes]' "
            "(or pass DigitBitmaps of your own)"
        ) from error
    images, labels = load_digits().images, load_digits().target
    order = np.random.default_rng(0).permutation(len(labels))
    chosen = []
    for digit in range(10):
        members = order[labels[order] == digit]
        cut = round(0.8 * len(members))
        chosen.append(members[:cut] if split == "train" else members[cut:])
    indices = np.sort(np.concatenate(chosen))
    return DigitBitmaps((images[indices] / INK).astype(np.float32), labels[indices].astype(np.int64))


def held_out_digits(half: str) -> DigitBitmaps:
    """Half of the samples that are never trained on: "validation" to choose by, "test" to report on.

    Every second sample of each class, so that the halves share none. Raises InputError for another half.
    """
    if half not in HALVES:
        raise InputError(f"half must be 'validation' or 'test', got {half!r}")
    with np.load(HELD_OUT) as stored:
        images, labels = stored["images"], stored["labels"]
    first = HALVES.index(half)
    indices = np.sort(np.concatenate([np.flatnonzero(labels == digit)[first::2] for digit in range(10)]))
    return DigitBitmaps((images[indices] / INK).astype(np.float32), labels[indices].astype(np.int64))
