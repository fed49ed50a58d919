"""Keys and values that serve every question, kept between blocks and, in a folder, between runs.

Of one branch they take ``layers x N x 2 kv`` numbers. An entry's name is a digest of all that its values depend on: the
weights, the types, the context's tokens and positions, the branch's edits. So nothing stale can be found, and entries
need no other care than a limit on their size.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

from jaxmllm.analysis.sharing.rule import Segment, Tier
from jaxmllm.analysis.sharing.segments import take_slots
from jaxmllm.models.attention import KeyValue

if TYPE_CHECKING:
    from jaxmllm.analysis.sharing.plan import Plan
    from jaxmllm.analysis.sharing.work import LaneWork

FORMAT = "jaxmllm shared keys 1"
# Of entries alone: the folder may hold other files, a model's weights even, and these must never make room.
SUFFIX = ".keys.safetensors"

Entry = dict[tuple[int, Segment], KeyValue]


class SharedKeys:
    """Entries in memory up to a limit, then in a folder up to another; beyond both they are computed again each time.

    Args:
      memory: bytes to keep in the device's memory.
      folder: where entries are kept on disk; ``None`` keeps none. It is made when the first one is written.
      disk: bytes to keep there; the entries that were not used for longest make room.
    """

    def __init__(self, memory: int = 0, folder: Path | None = None, disk: int = 0):
        self.memory, self.folder, self.disk = memory, folder if disk > 0 else None, disk
        self.entries: dict[str, Entry] = {}
        self.used = 0

    @property
    def outlives_run(self) -> bool:
        return self.folder is not None

    def open(self, name: str, size: int) -> StoredKeys | None:
        """An entry to read, or one to fill; ``None`` where one of ``size`` bytes would not be kept."""
        if name in self.entries:
            return StoredKeys(self, name, self.entries[name], complete=True)
        if self.folder is not None:
            entry = read_entry(self.folder / (name + SUFFIX))
            if entry is not None:
                return StoredKeys(self, name, entry, complete=True)
        fits_disk = self.folder is not None and size <= self.disk
        if self.used + size <= self.memory or fits_disk:
            return StoredKeys(self, name, {}, complete=False)
        return None

    def keep(self, name: str, entry: Entry) -> None:
        """Takes a filled entry."""
        size = sum(leaf.nbytes for keys in entry.values() for leaf in (keys.key, keys.value))
        if self.used + size <= self.memory:
            self.entries[name] = entry
            self.used += size
        if self.folder is not None and size <= self.disk:
            try:
                make_room(self.folder, self.disk - size)
                write_entry(self.folder / (name + SUFFIX), entry)
            except OSError:
                self.folder = None  # a full or read-only disk costs time, not the sweep


class StoredKeys:
    """One entry, being read or being filled; layer by layer, in order."""

    def __init__(self, store: SharedKeys, name: str, entry: Any, complete: bool):
        self.store, self.name, self.entry, self.complete = store, name, entry, complete

    def read(self, layer: int, segment: Segment) -> KeyValue:
        return self.entry[layer, segment]

    def write(self, layer: int, segment: Segment, keys: KeyValue) -> None:
        self.entry[layer, segment] = keys

    def close(self) -> None:
        """Hands a filled entry to the store."""
        if not self.complete:
            self.store.keep(self.name, self.entry)


class EntryFile:
    """An entry on disk; each layer is read when it is asked for."""

    def __init__(self, path: Path):
        from safetensors import safe_open

        self.file = safe_open(path, framework="flax")
        self.names = set(self.file.keys())

    def __getitem__(self, place: tuple[int, Segment]) -> KeyValue:
        layer, segment = place
        key, value = (self.file.get_tensor(f"{layer}.{segment.name}.{part}") for part in ("key", "value"))
        return KeyValue(key, value)


def read_entry(path: Path) -> EntryFile | None:
    """An entry, or ``None`` where there is none that can be read."""
    from safetensors import SafetensorError

    try:
        entry = EntryFile(path)
    except (OSError, SafetensorError):
        # a broken one is computed and written again; where it cannot be removed, it is in nobody's way
        with suppress(OSError):
            path.unlink(missing_ok=True)
        return None
    # those that were not used for longest make room first; a folder that may only be read keeps no such times
    with suppress(OSError):
        os.utime(path)
    return entry


def write_entry(path: Path, entry: Entry) -> None:
    """Writes an entry; it appears whole or not at all."""
    from safetensors.flax import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{layer}.{segment.name}.{part}": getattr(keys, part)
        for (layer, segment), keys in entry.items()
        for part in ("key", "value")
    }
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=SUFFIX)
    os.close(handle)
    try:
        save_file(tensors, temporary)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def make_room(folder: Path, limit: int) -> None:
    """Removes the entries that were not used for longest until the rest takes at most ``limit`` bytes."""
    if not folder.is_dir():
        return
    found = []
    for path in folder.glob(f"*{SUFFIX}"):
        try:
            found.append((path.stat().st_mtime, path.stat().st_size, path))
        except FileNotFoundError:
            continue  # another run made room
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= limit:
            break
        path.unlink(missing_ok=True)
        total -= size


@jax.jit
def checksum(leaf: Array) -> UInt32[Array, "2"]:
    """Two sums over the bits of an array, each bit pattern weighted by a hash of its place."""
    bits = jax.lax.bitcast_convert_type(leaf, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize])
    bits = bits.reshape(-1).astype(jnp.uint32)
    place = jnp.arange(bits.size, dtype=jnp.uint32)
    mixed = (bits ^ (place * jnp.uint32(2654435761))) * jnp.uint32(2246822519)
    mixed = mixed ^ (mixed >> 15)
    return jnp.stack([jnp.sum(mixed), jnp.sum(mixed * (place | 1))])


def fingerprint(params: Any) -> str:
    """A digest of weights, their types and their names."""
    digest = hashlib.blake2b(digest_size=16)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        digest.update(np.asarray(checksum(leaf)).tobytes())
    return digest.hexdigest()


def branch_name(model: str, work: LaneWork, plan: Plan) -> str:
    """The name of what a branch shares over a lane."""
    place = work.place(Tier.GROUP, None)
    path, width = plan.path, place.slots.shape[1]
    digest = hashlib.blake2b(digest_size=16)

    def add(*arrays: Any) -> None:
        for array in arrays:
            array = np.asarray(array)
            digest.update(f"{array.dtype} {array.shape} ".encode())
            digest.update(np.ascontiguousarray(array).tobytes())

    digest.update(f"{FORMAT} {model} {work.dtype} ".encode())
    add(take_slots(np.asarray(work.inputs.input_ids), place.numbers, place.slots))
    add(place.layout.valid, place.layout.positions, np.array(work.chunk(None).lengths[:2]))
    if place.layout.mask is not None:
        add(place.layout.mask)
    add(path.runs[:, :2], path.tier[:, :2], path.wiped[:, :2])
    for kind in ("erase", "blind", "knockout"):
        for term in getattr(plan.branch, kind):
            digest.update(kind.encode())
            add(term.gate, *(take_slots(weights, place.numbers, place.slots)[:, :width] for weights in term.weights))
    if plan.branch.head_scale is not None:
        add(plan.branch.head_scale)
    return digest.hexdigest()
