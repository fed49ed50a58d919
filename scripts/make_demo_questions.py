"""Writes the held-out questions that ship with the package: 48 scenes with digits of the test split, 8 questions each.

    python scripts/make_demo_questions.py jaxmllm/demo/questions

The demo reports on these, so nothing is chosen by them: the seed is fixed and differs from those of training and of
scripts/evaluate_demo_model.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from jaxmllm.data.digits import load_digit_bitmaps
from jaxmllm.data.scene_questions import write_question_set

SEED = 260108151


def write(folder: Annotated[Path, typer.Argument(help="New folder.")]) -> None:
    """Writes the question set."""
    path = write_question_set(folder, np.random.default_rng(SEED), load_digit_bitmaps("test"), scenes=48)
    print(f"wrote {path}")


if __name__ == "__main__":
    typer.run(write)
