"""Compares a decoder layer compiled for a TPU with the fused attention kernel and without it. Needs libtpu, but no TPU.

    pip install libtpu
    python scripts/compare_attention.py                     # a layer of LLaVA-1.5-7B, batch 8; about a minute
    python scripts/compare_attention.py --batch 1 --lengths 3000

What the compiler says of one layer (bfloat16, one v5e chip): bytes it holds meanwhile, and cycles that it expects. Of a
Pallas kernel it expects nothing, so there a floor is given instead: the multiplications of all tiles that the kernel
visits, at the highest rate of the chip's matrix units. The last line is JSON.
"""

from __future__ import annotations

import json
import os
import re
import sys
from typing import Annotated, Any

# Must stand before jax is imported: libtpu neither asks a cloud for its TPU nor waits for another process to be done.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import jax.numpy as jnp
import typer
from flax import nnx
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from jaxmllm.analysis.sharing.programs import RunEdits, run_layer
from jaxmllm.models import forward as pure
from jaxmllm.models import fused
from jaxmllm.models.capture import Capture
from jaxmllm.models.decoder import DecoderLayer
from jaxmllm.models.layers import Builder
from jaxmllm.models.layout import Layout
from jaxmllm.models.text_config import DecoderConfig

TOPOLOGY = "v5e:2x2"

# Floating-point operations a cycle: four matrix units of 128 x 128, so 197 Tflop/s at 1.5 GHz.
PEAK = 4 * 128 * 128 * 2


def compile_layer(config: DecoderConfig, batch: int, length: int, device: Any, with_kernel: bool) -> Any:
    """One layer over a whole sequence, compiled for one chip."""
    place = SingleDeviceSharding(device)

    def shape(*sizes: int, dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)

    def build() -> nnx.Module:
        return DecoderLayer(config, Builder(jnp.dtype("bfloat16"), jnp.dtype("bfloat16"), nnx.Rngs(0)))

    graphdef, skeleton = pure.split(nnx.eval_shape(build))
    params = jax.tree.map(lambda leaf: shape(*leaf.shape, dtype=leaf.dtype), skeleton)
    flags = shape(batch, length, dtype=jnp.bool_)
    layout = Layout(flags, flags, shape(batch, length, dtype=jnp.int32), None, None, length)
    hidden = shape(batch, length, config.hidden_size, dtype=jnp.bfloat16)

    def layer(params: Any, hidden: Any, layout: Any) -> Any:
        settings = {"start": 0, "stop": length, "capture": Capture(), "keys_alone": False, "at_once": batch}
        return run_layer(graphdef, params, jnp.int32(0), hidden, (), layout, RunEdits(), config=config, **settings)

    shortest = fused.SHORTEST
    fused.SHORTEST = shortest if with_kernel else length + 1
    jax.clear_caches()  # else the layer traced before is taken
    try:
        return jax.jit(layer).lower(params, hidden, layout).compile()
    finally:
        fused.SHORTEST = shortest


def expected_cycles(compiled: Any) -> int:
    """The compiler's cycles of all steps of a program without loops."""
    text = compiled.as_text()
    if re.search(r"\bwhile\(", text):
        sys.exit("the program holds loops, whose steps this does not count")
    return sum(int(cycles) for cycles in re.findall(r'"estimated_cycles":"(\d+)"', text))


def kernel_floor(config: DecoderConfig, batch: int, length: int) -> int:
    """Cycles that the kernel's multiplications take at the least."""
    tile, padded = fused.tiles(length)
    visited = sum(range(1, padded // tile + 1))
    return batch * config.num_heads * visited * 4 * tile * tile * config.head_dim // PEAK


def compare(
    lengths: Annotated[str, typer.Option(help="positions, separated by commas")] = "704,3000",
    batch: Annotated[int, typer.Option(help="examples")] = 8,
) -> None:
    """Prints a line for each length and way, then one JSON line."""
    device = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY).devices[0]
    config = DecoderConfig()
    found = []
    for length in map(int, lengths.split(",")):
        for with_kernel in (False, True):
            compiled = compile_layer(config, batch, length, device, with_kernel)
            line = {
                "length": length,
                "kernel": with_kernel,
                "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
                "expected_cycles": expected_cycles(compiled),
                "kernel_floor": kernel_floor(config, batch, length) if with_kernel else 0,
            }
            if with_kernel != ("splash" in compiled.as_text()):
                sys.exit("the kernel is not where it should be")
            found.append(line)
            print(
                f"S {length:5d}  {'kernel' if with_kernel else 'plain ':6s}"
                f"  {line['temporary_bytes'] / 1e9:7.3f} GB held  {line['expected_cycles'] / 1e6:8.2f} Mcycles expected"
                f"  + {line['kernel_floor'] / 1e6:6.2f} at least in the kernel"
            )
    print(json.dumps({"topology": TOPOLOGY, "batch": batch, "jax": jax.__version__, "layers": found}))


if __name__ == "__main__":
    typer.run(compare)
