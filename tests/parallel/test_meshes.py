"""The embedded model on meshes of eight devices computes what one device computes, and lies where it should."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import environment

# Where every number of a mesh has to be, against one device; float32 sums in another order.
TOLERANCE = 1e-4


def on(*meshes):
    script = Path(__file__).with_name("on_meshes.py")
    done = subprocess.run(
        [sys.executable, script, *meshes], env=environment(8), capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def check(found):
    assert found["tokens"], found
    assert max(found["largest"].values()) < TOLERANCE, found
    assert found["repeats"], found


def test_examples_and_heads_on_a_mesh():
    (found,) = on("4x2")
    check(found)
    assert found["logits"][0] == "data" and found["residual"][:2] == [None, "data"]
    assert found["query"] == [None, None, "model"]


@pytest.mark.slow
def test_every_mesh_of_eight_devices():
    found = {each["mesh"]: each for each in on("1x1", "8x1", "2x4", "1x8")}
    assert set(found) == {"1x1", "8x1", "2x4", "1x8"}
    for each in found.values():
        check(each)
    assert found["8x1"]["query"] == [] and found["2x4"]["query"] == [None, None, "model"]
    assert found["1x8"]["query"] == [], "four heads are not cut through by eight devices"
    # rows that are computed alone are the same to the last bit, wherever that is
    assert max(found["1x1"]["largest"].values()) == 0
