"""What decides a run's answers: told apart from another run's, so that results never mix."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from jaxmllm.data.benchmarks.base import Source
from jaxmllm.decoding import Sampling
from jaxmllm.errors import InputError
from jaxmllm.parallel.record import SETTINGS

# Told in messages and tables, but without a say in the answers: a folder may move, a limit may grow, and which split it
# is the fingerprint of its files says.
SHOWN = ("model", "data", "split", "limit")
# Files up to this many bytes are read whole for a fingerprint, of others three pieces.
READ_WHOLE = 32_000_000
PIECE = 65_536


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a run, as ``run.json`` holds them.

    Attributes:
      model: as it was named; ``family`` its model_type; ``weights`` the fingerprint of its files.
      benchmark, split: what is asked; ``data`` the folder, ``files`` the fingerprint of the files that list questions.
      prompt: the filled-in form that questions take.
      edits: as ``jaxmllm.analysis.edit_specs`` has them; ``None`` for the clean model.
      method: as ``jaxmllm.methods.spell`` has it; ``None`` for plain answers.
      temperature, top_k, top_p, seed: of sampling; all ``None`` for greedy answers.
      dtype: what the model computes in.
      max_new_tokens: tokens an answer may have.
      limit: questions taken; ``None`` for all.
    """

    model: str
    family: str
    weights: str
    benchmark: str
    split: str | None
    data: str
    files: str
    prompt: str
    edits: str | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    seed: int | None
    dtype: str
    max_new_tokens: int
    limit: int | None
    method: str | None = None

    def sampling(self) -> Sampling | None:
        """How tokens are drawn; ``None`` where answers are greedy."""
        return None if self.temperature is None else Sampling(self.temperature, self.top_k, self.top_p)


def differences(one: Settings, other: Settings, without: tuple[str, ...] = ()) -> dict[str, tuple[Any, Any]]:
    """The settings in which two runs differ, by name, ``without`` some."""
    pairs = {name: (value, getattr(other, name)) for name, value in dataclasses.asdict(one).items()}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1] and name not in without}


def read_settings(folder: Path) -> Settings:
    """The settings of a run.

    Raises:
      InputError: the folder holds no run, or its settings cannot be read.
    """
    path = folder / SETTINGS
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        return Settings(**fields)
    except FileNotFoundError:
        raise InputError(
            f"{folder}: no run of `jaxmllm evaluate` is here ({SETTINGS} is missing); name the folder that "
            "was given as --logdir"
        ) from None
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: not the settings of a run ({error}); take another folder") from error


def model_fingerprint(folder: Path) -> str:
    """A fingerprint of a checkpoint's files: their names and sizes, and what small ones hold.

    Of large files three pieces count, so that weights trained differently differ; descriptions (``.md``) and hidden
    files do not count.
    """
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".md"]
    digest = hashlib.sha256()
    for path in paths:
        name = path.relative_to(folder).as_posix()
        if any(part.startswith(".") for part in name.split("/")):
            continue
        size = path.stat().st_size
        digest.update(f"{name}\0{size}\0".encode())
        with open(path, "rb") as file:
            if size <= READ_WHOLE:
                digest.update(file.read())
                continue
            for start in (0, size // 2, size - PIECE):
                file.seek(start)
                digest.update(file.read(PIECE))
    return digest.hexdigest()[:16]


def data_fingerprint(source: Source) -> str:
    """A fingerprint of the names and sizes of the files that list a benchmark's questions."""
    files = [(part.records.path.name, part.records.path.stat().st_size) for part in source.parts]
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]
