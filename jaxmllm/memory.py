"""How much memory may be taken, and how it is told."""

from __future__ import annotations

import ctypes
import gc
import os
import sys

import jax


def gigabytes(size: int) -> str:
    """Bytes for people."""
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"


def default_budget() -> int:
    """What the first device says it may use, or half of the machine's memory where it does not say."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int(0.9 * stats["bytes_limit"])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def trim() -> None:
    """Gives memory that is free back to the system, where the C library keeps it."""
    gc.collect()
    if sys.platform == "linux":
        release = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
        if release is not None:
            release(0)
