"""Writes the held-out handwritten digits that ship with the package, so that drawing scenes needs no scikit-learn.

    python scripts/make_demo_digits.py jaxmllm/demo/digits.npz

They are the test samples of ``load_digit_bitmaps``, from scikit-learn's copy of the UCI set "Optical Recognition of
Handwritten Digits": ``images`` [n, 8, 8], ink from 0 to 16, and ``labels`` [n], both uint8.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from jaxmllm.data.digits import INK, load_digit_bitmaps


def write(path: Annotated[Path, typer.Argument(help="The .npz file.")]) -> None:
    """Writes the bitmaps."""
    digits = load_digit_bitmaps("test")
    np.savez_compressed(
        path, images=np.rint(digits.images * INK).astype(np.uint8), labels=digits.labels.astype(np.uint8)
    )
    print(f"wrote {len(digits.labels)} digits to {path}")


if __name__ == "__main__":
    typer.run(write)
