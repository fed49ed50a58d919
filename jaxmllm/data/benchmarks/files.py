"""Where official files and images lie in a folder of data."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Sequence
from pathlib import Path

from jaxmllm.data.fields import RecordError
from jaxmllm.errors import InputError

# Folders under DATA, besides itself, that are looked through for question files: as the official archives unpack.
QUESTION_FOLDERS = (
    "questions", "Questions", "annotations", "Annotations", "questions1.2", "spdocvqa_qas", "coco", "output/coco",
)  # fmt: skip
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".gz", ".7z")


def check_folder(data: str | Path | None) -> Path:
    """The folder of data that was given.

    Raises:
      InputError: none was given, it is not there, or it is a file.
    """
    if data is None:
        raise InputError("this benchmark needs the folder of its official files; name it with --data DIR")
    data = Path(data)
    if data.is_dir():
        return data
    if not data.exists():
        raise InputError(f"{data}: no such folder; expected the folder that holds the official files and images")
    if data.name.lower().endswith(ARCHIVES):
        raise InputError(f"{data}: an archive; unzip it, and give the folder that holds the official files and images")
    raise InputError(f"{data}: a file; expected the folder that holds the official files and images")


def find_files(data: Path, pattern: str) -> list[Path]:
    """All files in the folder and its usual sub-folders whose name is of a pattern (a regular expression), by name."""
    found: dict[tuple[int, int], Path] = {}
    for folder in (data, *(data / name for name in QUESTION_FOLDERS)):
        if folder.is_dir():
            for path in sorted(folder.iterdir()):
                if re.fullmatch(pattern, path.name) and path.is_file():
                    status = path.stat()  # one folder may go by two of the names where case does not count
                    found.setdefault((status.st_dev, status.st_ino), path)
    return sorted(found.values(), key=lambda path: (path.name, path))


def choose_file(
    data: Path, pattern: str, shown: str, split: str | None = None, defaults: Sequence[str] = ()
) -> tuple[Path, str]:
    """The question file of a split.

    Args:
      data: the folder.
      pattern: regular expression of file names, whose group ``split`` is the split.
      shown: the pattern as messages show it.
      split: a split, or the whole name of a file without its ending; by default the first of the defaults that is
        there, or the only one.
      defaults: splits.

    Returns:
      The file and its split.

    Raises:
      InputError: there is no such file, or more than one.
    """
    files = find_files(data, pattern)
    if not files:
        raise InputError(missing(data, shown))
    splits = {path: _split_of(path, pattern) for path in files}
    there = sorted(set(splits.values()))
    if split is None:
        split = next((name for name in defaults if name in there), there[0] if len(there) == 1 else None)
    if split is None:
        raise InputError(f"{data}: holds several splits; name one with --split: {', '.join(there)}")
    chosen = [path for path in files if path.stem == split] or [path for path in files if splits[path] == split]
    if not chosen:
        raise InputError(f"{data}: holds no {shown} of split {split!r}; found {', '.join(there)}{unpack_hint(data)}")
    if len(chosen) > 1:
        raise InputError(f"{several(data, chosen)}, or name it with --split")
    return chosen[0], splits[chosen[0]]


def only_file(data: Path, pattern: str) -> Path | None:
    """The file whose name is of a pattern, or ``None`` where there is none.

    Raises:
      InputError: there is more than one.
    """
    found = find_files(data, pattern)
    if len(found) > 1:
        raise InputError(several(data, found))
    return found[0] if found else None


def several(data: Path, files: Sequence[Path]) -> str:
    """What is said of a folder that holds several files where one is meant."""
    return f"{data}: {len(files)} files may be meant: {', '.join(map(str, files))}; leave one there"


def missing(data: Path, shown: str) -> str:
    """What is said of a folder that does not hold a file."""
    looked = ", ".join(QUESTION_FOLDERS)
    return f"{data}: holds no {shown}; looked there and in its folders {looked}{unpack_hint(data)}"


def _split_of(path: Path, pattern: str) -> str:
    match = re.fullmatch(pattern, path.name)
    assert match is not None
    return match["split"]


def unpack_hint(data: Path) -> str:
    """What a message adds where archives lie in the folder."""
    packed = sorted(path.name for path in data.iterdir() if path.name.lower().endswith(ARCHIVES))
    return f"; unzip first: {', '.join(packed)}" if packed else ""


@dataclasses.dataclass(frozen=True)
class ImageFolders:
    """Folders that a benchmark's images may be in.

    Attributes:
      data: the folder of data, which is looked in last.
      names: folders under it, of which those that are there are looked in first.
    """

    data: Path
    names: tuple[str, ...]

    def find(self, where: str, *files: str) -> Path:
        """The image of a record.

        Args:
          where: the record.
          files: names that its image may have.

        Raises:
          RecordError: there is none.
        """
        for folder in (*self.names, ""):
            for file in files:
                path = os.path.join(self.data, folder, file)
                if os.path.isfile(path):
                    return Path(path)
        raise RecordError(where, f"no image {files[0]}; looked in {self._looked_in}")

    @functools.cached_property
    def _looked_in(self) -> str:
        """The folders, and what could be unpacked; listed once, for a whole benchmark's images may be missing."""
        folders = ", ".join(str(self.data / folder) for folder in (*self.names, ""))
        return f"{folders}{unpack_hint(self.data)}"
