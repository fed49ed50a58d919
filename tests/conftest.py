"""Shapes in signatures are checked at run time in every test; parity needs full float32 products on any backend."""

import os
from pathlib import Path

from jaxmllm.parallel import libtpu

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The TPU compiler, which is installed to plan for TPUs, complains at length where there is none.
os.environ.update({} if libtpu.has_tpu() else libtpu.ENVIRONMENT)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tiny models: torch's threads would spend their time waiting for each other while other workers compute.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Compiled programs are shared by the workers and kept for the next run, which then takes half the time.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import pytest
from jaxtyping import install_import_hook

install_import_hook("jaxmllm", "beartype.beartype")
jax.config.update("jax_default_matmul_precision", "highest")

from tests.support.families import VARIANTS  # noqa: E402


@pytest.fixture(scope="session", params=sorted(VARIANTS))
def pair(request, tmp_path_factory):
    """Each tiny model: PyTorch's, and ours loaded from the folder it saved."""
    from tests.support import tiny  # here, so that the goldens run where torch is not installed

    return tiny.make_pair(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session")
def plain_pair(tmp_path_factory):
    """One tiny model, for tests that do not depend on the variant."""
    from tests.support import tiny

    return tiny.make_pair("grouped_queries", tmp_path_factory.mktemp("plain"))
