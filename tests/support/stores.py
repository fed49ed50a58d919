"""Comparing stores file by file."""

import json
from pathlib import Path

import orbax.checkpoint as ocp

from jaxmllm.convert import store

# Orbax writes times, and the path that it wrote to, into these two.
OF_THE_MOMENT = ("params/_CHECKPOINT_METADATA", "params/commit_success.txt")


def everything_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def same_stores(got: Path, wanted: Path) -> None:
    """Both hold the same files, to the byte."""
    ours, theirs = everything_in(got), everything_in(wanted)
    assert sorted(ours) == sorted(theirs)
    different = [name for name in ours if ours[name] != theirs[name]]
    assert set(different) <= set(OF_THE_MOMENT)


def write_format_1(folder: Path, source: Path, params) -> None:
    """A store as the first version wrote it: all of it by Orbax at once, packed."""
    folder.mkdir()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((folder / store.PARAMS).absolute(), dict(params))
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    (folder / store.MARKER).write_text(json.dumps({"format": 1, "param_dtype": ["float32"]}))
