"""Reports as data: verdicts, exit codes, what departs, JSON."""

import dataclasses
import json

import pytest

from jaxmllm.files import write_json
from jaxmllm.validation.report import VERDICTS, Phase, Report
from tests.support.validation_reports import SWAPPED, make_comparison, make_report


def of_verdicts(*verdicts):
    phases = tuple(Phase(f"phase {place}", verdict, "") for place, verdict in enumerate(verdicts))
    return Report("model", "reference", {}, {}, "", phases)


@pytest.mark.parametrize(
    ("verdicts", "verdict", "code"),
    [
        (("passes", "passes"), "passes", 0),
        (("passes", "skipped"), "passes", 0),
        (("passes", "failed"), "failed", 2),
        (("failed", "differs", "passes"), "differs", 1),
        ((), "failed", 2),
    ],
)
def test_the_worst_phase_decides(verdicts, verdict, code):
    report = of_verdicts(*verdicts)
    assert report.verdict == verdict and report.exit_code == code and verdict in VERDICTS


@pytest.mark.parametrize(
    ("ratio", "departs"), [(0.0, False), (1.0, False), (1.001, True), (float("inf"), True), (float("nan"), True)]
)
def test_a_component_departs_above_one_and_where_nothing_can_be_said(ratio, departs):
    found = make_comparison("logits", ratio=1.0)
    assert dataclasses.replace(found, ratio=ratio).departs is departs


def test_causes_are_those_of_the_first_phase_that_differs():
    report = make_report("decoder.2.mlp_out", layers=4, blocks=2)
    assert report.verdict == "differs" and report.causes[0] == SWAPPED
    assert {each.component for each in report.phase("decoder").departures if each.kind == "own"} == {
        "decoder.2.mlp_out",
        "decoder.3.mlp_out",
    }
    assert make_report(layers=4, blocks=2).causes == ()


def test_json_holds_every_comparison_and_no_number_that_json_lacks(tmp_path):
    report = make_report("decoder.2.mlp_out", layers=4, blocks=2)
    broken = dataclasses.replace(
        make_comparison("logits", "run"), ratio=float("nan"), details={"kl_max": float("inf"), "rows": 3}
    )
    report = dataclasses.replace(report, phases=(*report.phases, Phase("more", "differs", "", (broken,))))
    write_json(tmp_path / "report.json", report.to_json())
    found = json.loads((tmp_path / "report.json").read_text())
    assert (found["verdict"], found["exit_code"], found["first"]) == ("differs", 1, "decoder.2.mlp_out")
    assert [len(phase["comparisons"]) for phase in found["phases"]] == [len(each.comparisons) for each in report.phases]
    (last,) = found["phases"][-1]["comparisons"]
    assert last["ratio"] == "nan" and last["departs"] and last["details"] == {"kl_max": "inf", "rows": 3}
