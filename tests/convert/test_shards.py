"""Reading straight into shards, in processes with several devices: equal values, and no more than is asked for."""

import json
import os
import socket
import subprocess
import sys

import pytest

from jaxmllm.convert import pieces
from jaxmllm.model import convert_checkpoint
from tests.support.demo import DEMO

READ = """
import json, sys
from pathlib import Path
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
folder, store, address, rank, processes = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
if processes > 1:
    jax.distributed.initialize(address, processes, rank)
from jaxmllm.convert import checkpoint, pieces
from jaxmllm.convert import store as stores
from jaxmllm.convert.plan import flatten, unflatten
from jaxmllm.model import _names_and_skeleton

table, skeleton = _names_and_skeleton(Path(folder), "float32")
leaves = flatten(skeleton)
mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "model"))

def spec(leaf, shape):
    # the axes that can be cut: one by four, the leading one of stacked leaves by two
    cut = [None] * len(shape)
    for axis in reversed(range(len(shape))):
        if "model" not in cut and shape[axis] % 4 == 0 and axis > 0:
            cut[axis] = "model"
    if len(shape) > 1 and shape[0] % 2 == 0:
        cut[0] = "data"
    return P(*cut)

shardings = unflatten({leaf: NamedSharding(mesh, spec(leaf, value.shape)) for leaf, value in leaves.items()})
reads = {}
read = checkpoint.SafetensorsWeights.read

def counted(self, leaf, region, dtype, seen=None):
    def count(array):
        reads[leaf] = reads.get(leaf, 0) + array.size
    return read(self, leaf, region, dtype, count)

def io_bytes():
    return int(dict(line.split(": ") for line in open("/proc/self/io").read().splitlines())["rchar"])

whole = flatten(checkpoint.read_params(Path(folder), table, skeleton, place=np.asarray))
checkpoint.SafetensorsWeights.read = counted
params = flatten(checkpoint.read_params(Path(folder), table, skeleton, shardings))
checkpoint.SafetensorsWeights.read = read
stores.read_store(Path(store), skeleton, shardings)  # once, so that modules that Orbax imports are not counted
before = io_bytes()
stored = flatten(stores.read_store(Path(store), skeleton, shardings))
taken = io_bytes() - before
held, shares = {}, 0
for leaf, value in leaves.items():
    sharding = flatten(shardings)[leaf]
    for array in (params[leaf], stored[leaf]):
        assert array.sharding == sharding and array.shape == value.shape and array.dtype == value.dtype
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), whole[leaf][shard.index], err_msg=leaf)
    regions = {pieces.region_of(shard.index, value.shape) for shard in params[leaf].addressable_shards}
    held[leaf] = sum(int(np.prod(pieces.shape_of(region))) for region in regions)
    if leaf.endswith("patch_embed/kernel"):  # patches are read whole for every part
        assert reads.pop(leaf) % held.pop(leaf) == 0
    else:
        assert reads[leaf] == held[leaf], leaf
print(json.dumps({
    "whole": sum(whole[leaf].size for leaf in held), "held": sum(held.values()), "read": sum(reads.values()),
    "store": taken,
}))
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run(folder, store, processes: int) -> list[dict]:
    """What every process held and read; together they have eight devices."""
    devices = f"--xla_force_host_platform_device_count={8 // processes}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": devices}
    address = f"127.0.0.1:{free_port()}"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", READ, folder, store, address, str(rank), str(processes)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for rank in range(processes)
    ]  # fmt: skip
    results = []
    for process in started:
        output, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors[-4000:]
        results.append(json.loads(output.splitlines()[-1]))
    return results


@pytest.fixture(scope="module")
def store(plain_pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("store") / "store"
    convert_checkpoint(plain_pair.folder, folder)
    return folder


def test_shards_of_one_process_are_read_once_and_equal_the_whole(plain_pair, store):
    (result,) = run(plain_pair.folder, store, 1)
    assert result["held"] == result["read"] == result["whole"]


@pytest.mark.slow
def test_each_of_two_processes_reads_about_its_share(tmp_path):
    """With pieces of one layer and an eighth of it, as large models have them."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(pieces, "WHOLE", 4000)
        convert_checkpoint(DEMO / "model", tmp_path / "store", "float32")
    for result in run(DEMO / "model", tmp_path / "store", 2):
        assert result["held"] < 0.55 * result["whole"]
        assert result["read"] == result["held"]
        metadata = 500_000  # of Orbax and of arrays
        assert result["store"] < 4 * 1.2 * result["held"] + metadata, result
