"""Plans of tiny models, by the TPU's compiler."""

import json
import math

import numpy as np
import pytest

from jaxmllm.analysis.sharing.budget import Lengths, plan_sweep
from jaxmllm.errors import InputError
from jaxmllm.model import make_skeleton
from jaxmllm.models.registry import family_of
from jaxmllm.parallel.mesh import bytes_a_device
from jaxmllm.planning import Work, plan_job
from jaxmllm.planning.chips import CHIPS
from jaxmllm.planning.plan import JobPlan
from jaxmllm.planning.sweeps import count_runs
from tests.planning.cases import needs_compiler, published, tiny, written
from tests.support.checkpoints import FIXTURES
from tests.support.commands import run
from tests.support.families import VARIANTS

MESH = {"data": 2, "model": 2}
V5E = CHIPS["v5e"]
FAMILIES = ("instructblip_cross_seldom", "next_mistral_window", "qwen2_5_vl", "qwen2_vl", "vip_five_layers")


@pytest.fixture(scope="module")
def evaluated() -> JobPlan:
    work = Work("evaluate", questions=100, rows=2, dtype="float32", new_tokens=5)
    return plan_job(tiny(), work, "v5e:2x2", MESH)


@needs_compiler
def test_bytes_are_the_sum_of_the_shards(evaluated):
    config = tiny()
    _, skeleton = make_skeleton(family_of(VARIANTS["grouped_queries"]).module, config, "float32", "float32")
    (plan,) = evaluated.meshes
    assert plan.parameters == bytes_a_device(skeleton, config, MESH)
    text = config.text
    slots = 16 + 64 + 16  # image, text padded to a bucket, room for new tokens
    cache = 2 * text.num_layers * 4 * slots * text.num_kv_heads * text.head_dim * 4
    assert plan.kept == {"key-value cache": cache // 4}
    assert plan.peak == max(program.memory for program in plan.programs)
    assert plan.peak > plan.parameters + cache // 4


@needs_compiler
def test_chips_of_a_row_exchange_what_the_decoder_sums(evaluated):
    """Two sums over the model axis a layer: of the prompts' residual stream once, of each new token's again."""
    config = tiny()
    prompts, tokens = evaluated.meshes[0].programs
    for program, steps in ((prompts, 1), (tokens, 4)):
        of_row = [each for each in program.collectives if each.group == 2]
        assert sum(each.count for each in of_row) >= 2 * config.text.num_layers * steps
    assert sum(each.size for each in prompts.collectives) >= 2 * config.text.num_layers * 2 * 64 * 48 * 4


@needs_compiler
def test_time_follows_from_cycles_and_exceeds_the_roofline(evaluated):
    (plan,) = evaluated.meshes
    assert plan.rows == 4
    batches = math.ceil(100 / 4)
    assert plan.seconds == pytest.approx(batches * sum(each.seconds(V5E) for each in plan.programs))
    assert all(each.cycles > 0 for each in plan.programs)
    assert plan.least_seconds < plan.seconds
    assert evaluated.chip_hours(plan) == pytest.approx(4 * plan.seconds / 3600)


@needs_compiler
def test_a_sweep_runs_what_its_own_plan_counts():
    """Layers x positions of all runs, in clean passes a question, against ``plan_sweep``'s."""
    config, work = tiny(), Work("sweep", questions=64, rows=2, dtype="float32")
    plan = plan_job(config, work, "v5e:2x2", MESH).best
    runs = {cost.name: cost.runs for cost in plan.programs}
    layers = config.text.num_layers
    tails = sum(layers - branch for branch in range(layers))
    # the last layer's branch changes nothing but the answer
    assert runs["edited question+answer, once a row"] == tails - 1
    assert runs["edited answer, once a row"] == 1
    assert runs["clean question+answer, once a row"] == runs["clean body, once a context"] == layers
    assert runs["answers read"] == 2 * layers
    assert set(plan.kept) == {"layer copies", "kept of the clean pass", "waiting states"}
    assert plan.peak <= 16 * 2**30


def test_runs_make_up_the_clean_passes_of_the_sweeps_own_plan():
    config, lengths = published("llava-1.5-7b-hf"), Lengths(8, 576, 31, 5)
    for edits in (("erase",), ("knockout",), ("blind",)):
        work = Work("sweep", edits=edits)
        counted = count_runs(config, work, lengths)
        sizes = np.array([lengths.head, lengths.body, lengths.question, lengths.answer])
        own = sum(
            times * sizes[list(kind.run.segments)].sum()
            for kind, times in counted.kinds.items()
            if kind.run.tier.name != "GROUP"
        )
        planned = plan_sweep(
            config, work.branches(32), lengths, itemsize=2, weights=0, layer_weights=0, batch_size=16,
            questions=1000, budget=10**12,
        )  # fmt: skip
        ratio = own / (32 * lengths.total) / planned.clean_passes
        assert 1 <= ratio < 1.08, edits  # the last layer counts whole here


@needs_compiler
def test_the_best_mesh_is_the_fastest_that_fits():
    work = Work("forward", questions=100, rows=1, dtype="float32")
    seen: list[str] = []
    plan = plan_job(tiny(), work, "v5e:1x2", on_mesh=seen.append)
    assert seen == ["data=2,model=1", "data=1,model=2"] == [each.name for each in plan.meshes]
    assert plan.best.seconds == min(each.seconds for each in plan.meshes)


@needs_compiler
def test_a_job_that_cannot_fit_is_refused_with_what_is_missing():
    """Weights alone are too much, so nothing is compiled."""
    with pytest.raises(InputError) as refused:
        plan_job(published("llava-1.5-13b-hf"), Work("evaluate", dtype="float32"), "v5e:1x1")
    message = str(refused.value)
    assert "does not fit v5e:1x1" in message and "53.36 GB a chip" in message and "36.44 GB more" in message
    assert "bfloat16, which takes half of it" in message and "chips with more memory (v5p)" in message
    assert "a topology of at least 4 such chips with model=4" in message


@needs_compiler
def test_a_batch_that_cannot_fit_is_refused_by_the_compiler():
    with pytest.raises(InputError, match=r"4096 questions a row it wants .*What would make it fit: a smaller batch"):
        plan_job(published("llava-1.5-7b-hf"), Work("forward", rows=4096, questions=4096), "v5e:1x1")


@needs_compiler
@pytest.mark.parametrize("mesh", [{"data": 3, "model": 1}, {"data": 1, "model": 8}])
def test_meshes_that_chips_or_heads_do_not_make_are_refused(mesh):
    topology = "v5e:2x4" if mesh["model"] == 8 else "v5e:2x2"
    with pytest.raises(InputError, match="expected sizes whose product is"):
        plan_job(tiny(), Work("forward"), topology, mesh)


@needs_compiler
def test_the_command_prints_its_tables_and_writes_all_of_it(tmp_path, monkeypatch, capsys):
    path = written(tmp_path, VARIANTS["grouped_queries"])
    options = ["--topology", "v5e:1x2", "--job", "forward", "--mesh", "model=2", "--batch-size", 2, "--questions", 50]
    assert run(monkeypatch, "plan", path, *options, "--json", tmp_path / "plan.json") == 0
    printed = capsys.readouterr().out
    assert "data=1,model=2" in printed and "clean pass" in printed and "never measured on a TPU" in printed
    record = json.loads((tmp_path / "plan.json").read_text())
    (mesh,) = record["meshes"]
    assert record["recommended"] == mesh["mesh"] == "data=1,model=2"
    assert mesh["rows"] == 2 and mesh["peak"] < record["usable"]
    assert mesh["questions_a_second"] == pytest.approx(50 / mesh["seconds"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--topology": "v9:2"}, "expected a chip"),
        ({"--image": "640"}, "image is '640'"),
        ({"--mesh": "data=x"}, "expected sizes of the axes data and model"),
        ({"model": "nowhere/at/all"}, "no such file or folder"),
        pytest.param({}, "does not fit v5e:1x1", marks=needs_compiler),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(changes, message, tmp_path, monkeypatch, capsys):
    options = {"model": FIXTURES / "llava-1.5-7b-hf", "--topology": "v5e:1x1", "--job": "forward", "--dtype": "float32"}
    options |= changes
    model = options.pop("model")
    assert run(monkeypatch, "plan", model, *[word for pair in options.items() for word in pair]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and "Traceback" not in error
    assert not list(tmp_path.iterdir())


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("job", ["evaluate", "forward", "sweep"])
@pytest.mark.parametrize("variant", FAMILIES)
def test_every_family_and_job_compiles(variant, job):
    work = Work(job, questions=64, rows=2, image=(64, 56), question_tokens=12, dtype="float32")
    plan = plan_job(tiny(variant), work, "v6e:2x2", MESH).best
    assert plan.rows == 4 and plan.seconds < math.inf
    assert all(cost.flops > 0 and cost.cycles > 0 for cost in plan.programs)
