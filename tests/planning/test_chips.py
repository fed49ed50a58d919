"""Topologies: what their names say, and what the compiler says of them."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from jaxmllm.errors import InputError
from jaxmllm.planning.chips import CHIPS, open_topology, parse_topology, read_refusal
from jaxmllm.planning.hlo import read_hlo
from tests.planning.cases import needs_compiler

GIB = 2**30


def test_names_of_topologies():
    assert parse_topology("v5e:4x4") == (CHIPS["v5e"], (4, 4))
    assert parse_topology("v5p:2x2x4") == (CHIPS["v5p"], (2, 2, 4))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("h100:8", "expected a chip"),
        ("v5e", "wired along 2 axes: write v5e:2x2"),
        ("v5e:2x2x2", "wired along 2 axes"),
        ("v4:4x4", "wired along 3 axes: write v4:2x2x2"),
        ("v5e:0x4", "wired along 2 axes"),
    ],
)
def test_wrong_names_are_refused(name, message):
    with pytest.raises(InputError, match=message):
        parse_topology(name)


def test_refusals_are_read():
    early = "RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (19.42G) exceeds available HBM (15.75G)."
    late = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 512.5M of 15.75G hbm. Exceeded hbm capacity"
    assert read_refusal(early) == (int(19.42 * GIB), int(15.75 * GIB))
    assert read_refusal(late) == (int(512.5 * 2**20), int(15.75 * GIB))
    with pytest.raises(ValueError, match="something else"):
        read_refusal("RESOURCE_EXHAUSTED: something else")


@needs_compiler
@pytest.mark.parametrize(("name", "chips"), [("v4:2x2x1", 4), ("v5e:2x4", 8), ("v5p:2x2x1", 4), ("v6e:2x2", 4)])
def test_one_device_a_chip_and_most_of_its_memory(name, chips):
    topology = open_topology(name)
    assert len(topology.devices) == chips
    assert 0.9 * topology.chip.memory < topology.usable <= 1.01 * topology.chip.memory
    assert topology.mesh({"data": chips // 2, "model": 2}).shape == {"data": chips // 2, "model": 2}


@needs_compiler
def test_topologies_that_cannot_be_built():
    with pytest.raises(InputError, match="the TPU compiler"):
        open_topology("v5e:3x5")


@needs_compiler
@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:1x1", "v5p:2x2x1", "v6e:1x1"])
def test_what_the_compilers_cycles_are_worth(name):
    """At the clock of the table, a large product is near the published peak, and a pass over memory far from it."""
    topology = open_topology(name)
    layout = SingleDeviceSharding(topology.devices[0])

    def seconds(function, *shapes):
        structs = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=layout) for shape in shapes]
        return read_hlo(jax.jit(function).lower(*structs).compile().as_text()).cycles / topology.chip.clock

    side = 8192
    with jax.default_matmul_precision("default"):
        product = seconds(jnp.matmul, (side, side), (side, side))
    assert 0.65 < 2 * side**3 / topology.chip.flops / product < 0.95
    stream = seconds(lambda x: x + 1, (2 * side, 2 * side))
    assert 2 < stream / (2 * 2 * (2 * side) ** 2 / topology.chip.bandwidth) < 3
