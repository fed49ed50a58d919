"""Real sizes on real topologies: the TPU's compiler takes them, and what it says of their memory adds up."""

import jax
import pytest

from jaxmllm.planning import Work, plan_job
from tests.planning.cases import needs_compiler, published

pytestmark = [pytest.mark.slow, needs_compiler]

# Model, topology, size of the model axis.
CASES = [
    ("llava-1.5-7b-hf", "v5e:4x4", 4),
    ("llava-1.5-13b-hf", "v5e:4x4", 4),
    ("qwen2.5-vl-7b-instruct", "v5e:4x4", 4),
    ("llava-v1.6-34b-hf", "v5e:4x4", 8),
    ("llava-1.5-7b-hf", "v5p:2x2x2", 2),
    ("llava-1.5-13b-hf", "v5p:2x2x2", 2),
    ("qwen2.5-vl-7b-instruct", "v5p:2x2x2", 2),
    ("llava-v1.6-34b-hf", "v5p:2x2x2", 4),
]


@pytest.fixture(autouse=True)
def precision_of_a_run():
    """The suite's own precision would make a TPU multiply float32 numbers several times over."""
    with jax.default_matmul_precision("default"):
        yield


@pytest.mark.parametrize(("name", "topology", "model"), CASES)
def test_answers_are_generated_within_memory(name, topology, model):
    config, work = published(name), Work("evaluate", rows=8)
    chips = 16 if topology == "v5e:4x4" else 8
    plan = plan_job(config, work, topology, {"data": chips // model, "model": model})
    (mesh,) = plan.meshes
    print("|", name, "|", topology, "|", mesh.name, "|", mesh.rows, "|", *_figures(plan, mesh))
    assert mesh.rows == 8 * chips // model
    assert mesh.parameters + sum(mesh.kept.values()) < mesh.peak < plan.usable
    prompts, tokens = mesh.programs
    assert prompts.kernels == config.text.num_layers  # the fused kernel runs in every layer of the decoder
    assert sum(each.count for each in prompts.collectives) >= 2 * config.text.num_layers
    assert sum(each.count for each in tokens.collectives) >= 2 * config.text.num_layers * 15
    assert mesh.least_seconds < mesh.seconds


def _figures(plan, mesh):
    """For docs/planning.md."""
    sizes = (mesh.parameters, sum(mesh.kept.values()), mesh.working, mesh.peak)
    rates = (plan.rate(mesh), plan.work.questions / mesh.least_seconds, plan.chip_hours(mesh))
    kernels = sum(each.kernels for each in mesh.programs)
    return [
        *(f"{size / 1e9:.2f} |" for size in sizes), *(f"{rate:.3g} |" for rate in rates), kernels, "|",
        f"{mesh.compile_seconds:.0f} |",
    ]  # fmt: skip


@pytest.mark.parametrize("edits", ["erase", "knockout"])
def test_a_sweep_of_a_real_size_fits(edits):
    plan = plan_job(
        published("llava-1.5-7b-hf"), Work("sweep", rows=8, edits=(edits,)), "v5e:4x4", {"data": 4, "model": 4}
    )
    (mesh,) = plan.meshes
    print("| sweep", edits, "|", mesh.name, "|", mesh.rows, "|", *_figures(plan, mesh), mesh.kept)
    assert mesh.peak < plan.usable
    assert mesh.least_seconds < mesh.seconds
