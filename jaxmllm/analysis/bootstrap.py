"""Bootstrap confidence intervals of means over questions."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

import numpy as np
from jaxtyping import Float

RESAMPLES = 2000
CONFIDENCE = 0.95
DRAWS_AT_ONCE = 1 << 20  # bounds the memory that many images take


def mean_interval(
    values: Float[np.ndarray, "*axes Q"],
    clusters: Sequence[Hashable] | None = None,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Float[np.ndarray, " 2 *axes"]:
    """Percentile bootstrap of the mean over the last axis.

    Args:
      values: one number a question.
      clusters: what each question belongs to, such as its image. Questions on one image are no independent draws, so
        clusters are resampled whole; by default every question is its own.
      confidence: coverage, 0..1.
      resamples: how many means are drawn.
      seed: of the draw; the same seed gives the same interval.

    Returns:
      Lower and upper bounds.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13; resampling by clusters after
    Davison and Hinkley, "Bootstrap Methods and their Application" (1997), section 3.8.
    """
    values = np.asarray(values, float)
    count = values.shape[-1]
    names = np.arange(count)
    if clusters is not None:
        names = np.unique([str(name) for name in clusters], return_inverse=True)[1]
    groups = int(names.max()) + 1
    sums, sizes = np.zeros((groups, *values.shape[:-1])), np.bincount(names, minlength=groups)
    np.add.at(sums, names, np.moveaxis(values, -1, 0))
    sums = np.moveaxis(sums, 0, -1)
    means = np.concatenate(
        [(sums @ times.T) / (sizes @ times.T) for times in _drawn(groups, resamples, np.random.default_rng(seed))],
        axis=-1,
    )
    tail = 100 * (1 - confidence) / 2
    return np.percentile(means, [tail, 100 - tail], axis=-1)


def _drawn(groups: int, resamples: int, rng: np.random.Generator) -> Iterator[Float[np.ndarray, "some groups"]]:
    """How often each group is drawn in each resample, some resamples at a time."""
    at_once = max(1, DRAWS_AT_ONCE // groups)
    for start in range(0, resamples, at_once):
        some = min(at_once, resamples - start)
        drawn = rng.integers(groups, size=(some, groups)) + groups * np.arange(some)[:, None]
        yield np.bincount(drawn.ravel(), minlength=some * groups).reshape(some, groups).astype(float)
