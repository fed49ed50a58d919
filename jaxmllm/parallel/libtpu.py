"""The TPU runtime, on machines with and without a TPU. Imports nothing, so that it can come before JAX."""

from __future__ import annotations

import os

TPU_DEVICES = ("/dev/accel0", "/dev/vfio/0")

# libtpu asks a cloud's metadata server who it is, wants a machine to itself, and complains where there is neither; a
# process that only compiles for TPUs needs none of it.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}


def has_tpu() -> bool:
    """Whether this machine shows the devices of a TPU."""
    return any(map(os.path.exists, TPU_DEVICES))


def compile_only() -> None:
    """Settles libtpu for compiling alone, where variables do not say otherwise."""
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
