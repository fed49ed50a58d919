"""Of every family one variant in each run of the tests; the others are slow."""

import pytest

from tests.support import families
from tests.support.families import VARIANTS

ONE_OF_EACH = {next(iter(family.VARIANTS)) for family in families.FAMILIES.values()}


@pytest.fixture(
    scope="session",
    params=[pytest.param(name, marks=() if name in ONE_OF_EACH else pytest.mark.slow) for name in sorted(VARIANTS)],
)
def pair(request, tmp_path_factory):
    """Each tiny model in both frameworks."""
    from tests.support import tiny

    return tiny.make_pair(request.param, tmp_path_factory.mktemp(request.param))
