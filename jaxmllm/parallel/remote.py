"""Runs whose folder is in a bucket: a local copy, kept equal to it through fsspec.

``gs://``, ``s3://`` and whatever else fsspec has a package for. Files are written locally first, as on any disk, and
pushed whole; a bucket shows an object whole or not at all, so what holds of a local run holds of the bucket.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxmllm.errors import InputError


def is_remote(place: str | Path) -> bool:
    """Whether a place is a URL rather than a path."""
    return "://" in str(place)


@dataclasses.dataclass
class Mirror:
    """A run's folder here, and where it really is.

    Attributes:
      folder: the local copy.
      url: where it really is; ``None`` where the local one is all there is.
      store: fsspec's file system, and ``root`` the folder in it.
      known: size and time of each local file when it was last equal to the remote one.
    """

    folder: Path
    url: str | None = None
    store: Any = None
    root: str = ""
    known: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)

    def pull(self) -> None:
        """Fetches what is new there.

        Raises:
          InputError: the store cannot be read.
        """
        if self.url is None:
            return
        with self._told("read"):
            self.store.invalidate_cache()
            found = self.store.find(self.root) if self.store.exists(self.root) else []
            for path in found:
                name = path[len(self.root) :].lstrip("/")
                local = self.folder / name
                if name in self.known and self.store.size(path) == self.known[name][0]:
                    continue
                local.parent.mkdir(parents=True, exist_ok=True)
                arriving = local.with_name(f".{local.name}.arriving")
                self.store.get_file(path, str(arriving))
                arriving.replace(local)
                self.known[name] = _state(local)

    def push(self) -> None:
        """Sends what has changed here since it was last equal, and removes there what was removed here.

        Raises:
          InputError: the store cannot be written; what is here is kept, and pushed with the next call.
        """
        if self.url is None:
            return
        with self._told("written"):
            here = {path.relative_to(self.folder).as_posix(): path for path in self._files()}
            for name, path in sorted(here.items()):
                state = _state(path)
                if self.known.get(name) != state:
                    self.store.makedirs(f"{self.root}/{name}".rpartition("/")[0], exist_ok=True)
                    self.store.put_file(str(path), f"{self.root}/{name}")
                    self.known[name] = state
            for name in self.known.keys() - here.keys():
                if self.store.exists(f"{self.root}/{name}"):
                    self.store.rm_file(f"{self.root}/{name}")
                del self.known[name]

    def _files(self) -> Iterator[Path]:
        """Finished files; those that are being written begin with a dot."""
        for path in self.folder.rglob("*"):
            parts = path.relative_to(self.folder).parts
            if path.is_file() and not any(part.startswith(".") for part in parts):
                yield path

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        try:
            yield
        except InputError:
            raise
        except Exception as error:  # each store raises its own kinds
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise InputError(
                f"{self.url}: cannot be {what} ({first}); check the name, your rights and the connection, and give the "
                "same command again to go on"
            ) from error


def _state(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


@contextmanager
def mirrored(place: str | Path) -> Iterator[Mirror]:
    """The folder of a run, wherever it is; what is there already is fetched first.

    Raises:
      InputError: no such store, its package is missing, or it cannot be read.
    """
    if not is_remote(place):
        yield Mirror(Path(place))
        return
    import fsspec

    url = str(place).rstrip("/")
    try:
        store, root = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise InputError(
            f"{url}: {error}; for gs:// install gcsfs, for s3:// s3fs, for others what fsspec names"
        ) from error
    with tempfile.TemporaryDirectory(prefix="jaxmllm-run-") as folder:
        # the run's folder is a new name within, so that it can be told from one that was there
        mirror = Mirror(Path(folder) / "run", url, store, root)
        mirror.pull()
        yield mirror
