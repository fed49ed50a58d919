"""Which mesh a model gets, how its weights are cut, and which processes belong together."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from jaxmllm.convert.plan import flatten
from jaxmllm.errors import InputError
from jaxmllm.model import make_skeleton
from jaxmllm.models.registry import family_of
from jaxmllm.models.sharding import param_specs
from jaxmllm.parallel import mesh as meshes
from tests.support.checkpoints import published_config

GIB = 2**30


def published(name):
    fields = published_config(name)
    family = family_of(fields)
    config = family.read_config(fields)
    return config, make_skeleton(family.module, config, "bfloat16", "bfloat16")[1]


def test_sizes_are_read():
    assert meshes.parse_mesh("data=4,model=2") == {"data": 4, "model": 2}
    assert meshes.parse_mesh("model=8") == {"data": 1, "model": 8}


@pytest.mark.parametrize("text", ["", "4x2", "data=0", "data=two", "tensor=2", "data=-1", "data=2;model=2"])
def test_other_sizes_are_refused(text):
    with pytest.raises(InputError, match="data=4,model=2"):
        meshes.parse_mesh(text)


@pytest.mark.parametrize(
    ("name", "memory", "expected"),
    [
        ("llava-1.5-7b-hf", 80 * GIB, 1),
        ("llava-1.5-7b-hf", 16 * GIB, 2),
        ("llava-1.5-13b-hf", 16 * GIB, 4),
        ("llava-v1.6-34b-hf", 16 * GIB, 8),
        ("qwen2.5-vl-72b-instruct", 32 * GIB, 8),
        ("qwen2-vl-2b-instruct", 16 * GIB, 1),
    ],
)
def test_the_model_axis_is_the_smallest_that_leaves_room(name, memory, expected):
    config, skeleton = published(name)
    assert meshes.choose_mesh(skeleton, config, 16, memory) == {"data": 16 // expected, "model": expected}
    there = meshes.bytes_a_device(skeleton, config, {"data": 1, "model": expected})
    assert there <= meshes.WEIGHTS_SHARE * memory
    if expected > 1:
        before = meshes.bytes_a_device(skeleton, config, {"data": 1, "model": expected // 2})
        assert before > meshes.WEIGHTS_SHARE * memory


def test_a_model_that_fits_nowhere_takes_the_longest_axis():
    config, skeleton = published("qwen2.5-vl-72b-instruct")
    assert meshes.choose_mesh(skeleton, config, 4, 16 * GIB) == {"data": 1, "model": 4}


def test_large_weights_are_cut_and_no_head_is_cut_through():
    config, skeleton = published("qwen2-vl-7b-instruct")  # 28 heads, 4 key-value heads
    for model, heads, kv_heads in [(2, "model", "model"), (4, "model", "model"), (7, "model", None), (8, None, None)]:
        specs = flatten(param_specs(skeleton, config, meshes.abstract_mesh({"data": 1, "model": model})))
        assert specs["decoder/layers/attention/query/kernel"] == _spec(None, None, heads)
        assert specs["decoder/layers/attention/query/bias"] == _spec(None, heads)
        assert specs["decoder/layers/attention/out/kernel"] == _spec(None, heads, None)
        assert specs["decoder/layers/attention/key/kernel"] == _spec(None, None, kv_heads)


def _spec(*axes):
    return PartitionSpec(*axes) if any(axes) else PartitionSpec()


def test_every_published_model_is_cut_by_the_one_table():
    names = [
        "llava-1.5-13b-hf",
        "llava-v1.6-34b-hf",
        "vip-llava-13b-hf",
        "instructblip-vicuna-13b",
        "qwen2.5-vl-32b-instruct",
    ]
    for name in names:
        config, skeleton = published(name)
        whole = meshes.bytes_a_device(skeleton, config, {"data": 8, "model": 1})
        parts = meshes.bytes_a_device(skeleton, config, {"data": 2, "model": 4})
        assert parts < 0.3 * whole if "instructblip" not in name else parts < 0.4 * whole, name


def test_a_vocabulary_that_does_not_divide_is_cut_along_its_width():
    config, skeleton = published("instructblip-vicuna-7b")  # 32,001 tokens
    specs = flatten(param_specs(skeleton, config, meshes.abstract_mesh({"data": 1, "model": 2})))
    assert specs["decoder/embed/embedding"] == _spec(None, "model")
    assert specs["decoder/head/kernel"] == _spec("model", None)


@dataclasses.dataclass(frozen=True)
class Device:
    """Stands for a device of another process; a mesh asks no more of it."""

    id: int
    process_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"


def groups(shape, processes):
    """The group of every process, where the devices of each stand side by side."""
    many = int(np.prod(shape))
    devices = np.array([Device(i, i * processes // many) for i in range(many)]).reshape(shape)
    mesh = Mesh(devices, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    return [meshes.group_of(mesh, process) for process in range(processes)]


def test_processes_that_share_no_row_are_alone():
    found = groups((8, 1), 4)
    assert [(group.index, group.count, group.leader) for group in found] == [(i, 4, True) for i in range(4)]
    assert [group.mesh.devices.shape for group in found] == [(2, 1)] * 4
    assert [[d.id for d in group.mesh.devices.flat] for group in found] == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_processes_that_share_a_row_work_together_and_one_leads():
    found = groups((2, 4), 4)
    assert [(group.index, group.leader) for group in found] == [(0, True), (0, False), (1, True), (1, False)]
    assert all(group.count == 2 and group.mesh.devices.shape == (1, 4) for group in found)
    found = groups((1, 8), 4)
    assert [(group.index, group.count, group.leader) for group in found] == [(0, 1, i == 0) for i in range(4)]


def test_a_process_with_one_device_of_its_own_needs_no_mesh():
    found = groups((4, 1), 4)
    assert [(group.index, group.mesh, group.data) for group in found] == [(i, None, 1) for i in range(4)]


def test_a_mesh_that_takes_other_devices_is_refused():
    with pytest.raises(InputError, match=f"takes 6 devices and there are {jax.device_count()}"):
        meshes.arrange({"data": 3, "model": 2})
