"""What a run's folder says of itself: its settings, and by what it was made."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxmllm.errors import InputError
from jaxmllm.files import write_json

SETTINGS = "run.json"
MADE_BY = "versions.json"
CUT = "cut.json"  # how a run's questions are cut
BUSY = "another process is writing this run; wait for it, or take another folder"
NOT_SHARED = (
    "{}: this process does not see what the first one wrote; give all processes a folder on a disk that they share, or "
    "a URL (gs://bucket/run)"
)
PACKAGES = ("jaxmllm", "jax", "jaxlib", "flax", "orbax-checkpoint", "numpy", "transformers", "tokenizers", "pillow")


def read_record(folder: Path, name: str = SETTINGS) -> dict[str, Any] | None:
    """A file of JSON of a run; ``None`` where there is none.

    Raises:
      InputError: it cannot be read.
    """
    path = folder / name
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); take another folder") from error
    if not isinstance(fields, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(fields).__name__}; take another folder")
    return fields


def check_same(folder: Path, there: Mapping[str, Any], now: Mapping[str, Any], without: tuple[str, ...] = ()) -> None:
    """Checks that a folder's run is the one that is asked for.

    Args:
      folder: of the run.
      there: its settings; ``now`` those that are asked for, as JSON would give them back.
      without: settings that have no say in the results.

    Raises:
      InputError: showing the settings that differ.
    """
    plain = json.loads(json.dumps(now))
    names = [name for name in {**there, **plain} if name not in without]
    changed = [
        f"{name} is {there.get(name)!r} there and {plain.get(name)!r} now"
        for name in names
        if there.get(name) != plain.get(name)
    ]
    if changed:
        raise InputError(
            f"{folder} holds a run with other settings: {'; '.join(changed)}. Name another folder for this run"
        )


def note_versions(folder: Path, **more: Any) -> None:
    """Adds to a run's folder by what it is made now: versions, revision of the source, devices, and ``more``."""
    known = read_record(folder, MADE_BY) or {"starts": []}
    write_json(folder / MADE_BY, {"starts": [*known["starts"], made_by() | more]})


def made_by() -> dict[str, Any]:
    """Versions of what computes, the revision of jaxmllm's source where it runs from a checkout, and the devices."""
    import jax

    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    devices = jax.devices()
    return {
        "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "python": platform.python_version(),
        "packages": versions,
        "revision": git_revision(Path(__file__).resolve().parents[2]),
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "processes": jax.process_count(),
    }


def git_revision(folder: Path) -> str | None:
    """The commit that a checkout stands at, read from its files; ``None`` where there is no checkout."""
    git = folder / ".git"
    try:
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head
        name = head.removeprefix("ref: ")
        if (git / name).is_file():
            return (git / name).read_text().strip()
        packed = (git / "packed-refs").read_text().splitlines()
        return next((line.split()[0] for line in packed if line.endswith(f" {name}")), None)
    except OSError:
        return None
