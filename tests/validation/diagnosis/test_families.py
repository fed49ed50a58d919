"""The plain computation is the port's, component by component, in every family."""

import numpy as np
import pytest

from jaxmllm.validation.diagnosis.causes import study_of
from jaxmllm.validation.diagnosis.sample import distance
from tests.validation.diagnosis.cases import GOLDENS, make_case, reference

QUICK = "llama3_rope"
ALONE = {"image_tokens"}  # compared by order alone


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(path.name, marks=() if path.name == QUICK else pytest.mark.slow)
        for path in sorted(GOLDENS.iterdir())
    ],
)
def test_plain_computation_is_the_ports(name):
    sound, compared = reference(name), 0
    for component, array in sound.arrays.items():
        study = study_of(make_case(sound, component, array))
        if study is None:
            assert component.endswith("resid_pre") or component in ALONE
            continue
        right, sample = study.correct(), study.sample
        scale = np.sqrt(np.mean(sample.expected[sample.mask] ** 2))
        assert distance(right, sample.expected, sample.mask) <= 3e-6 * scale, component
        compared += 1
    assert compared > 30
