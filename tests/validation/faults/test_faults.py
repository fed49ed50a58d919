"""A validation catches every planted bug, names where it shows first and why; the same checkpoints pass without one."""

import pytest

from tests.validation.faults.catalogue import FAULTS, QUICK
from tests.validation.faults.catching import Bench, phases_of


@pytest.fixture(scope="session")
def bench(tmp_path_factory):
    """Checkpoints and recordings, each made once."""
    return Bench(tmp_path_factory.mktemp("faults"))


def slow_unless(quick):
    return () if quick else pytest.mark.slow


def test_names_are_unique():
    names = [fault.name for fault in FAULTS]
    assert len(names) == len(set(names)) > 90
    assert set(names) >= QUICK


@pytest.mark.parametrize(
    "fault", [pytest.param(fault, id=fault.name, marks=slow_unless(fault.name in QUICK)) for fault in FAULTS]
)
def test_a_planted_bug_is_caught(fault, bench):
    catch = bench.catch(fault)
    assert catch.caught
    assert catch.at(fault), catch.named
    assert catch.because(fault), catch.causes
    if fault.also:
        assert catch.report.phase(fault.also).verdict == "differs"


def without_a_bug():
    """One bug of each variant, type and choice of phases; quick ones first."""
    cases = {}
    for fault in sorted(FAULTS, key=lambda fault: fault.name not in QUICK):
        cases.setdefault((fault.on, fault.dtype, phases_of(fault)), fault)
    return [
        pytest.param(fault, id=f"{on}-{dtype}-{phases[-1]}", marks=slow_unless(fault.name in QUICK))
        for (on, dtype, phases), fault in cases.items()
    ]


@pytest.mark.parametrize("fault", without_a_bug())
def test_without_a_bug_all_phases_pass(fault, bench):
    report = bench.validate(fault)
    assert {phase.name: phase.verdict for phase in report.phases} == dict.fromkeys(phases_of(fault), "passes"), [
        (phase.summary, phase.findings) for phase in report.phases
    ]


@pytest.mark.parametrize("name", ["gate and up exchanged at load", "attention scale missing"])
def test_nothing_is_left_of_a_bug(name, bench):
    fault = next(fault for fault in FAULTS if fault.name == name)
    bench.catch(fault)
    report = bench.validate(fault)
    assert report.verdict == "passes", [phase.summary for phase in report.phases]
