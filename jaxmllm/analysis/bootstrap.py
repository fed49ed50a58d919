"""Bootstrap confidence intervals of means over questions."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import Float

RESAMPLES = 2000
CONFIDENCE = 0.95


def mean_interval(
    values: Float[np.ndarray, "*axes Q"],
    clusters: Sequence[Hashable] | None = None,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Float[np.ndarray, "2 *axes"]:
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
    drawn = np.random.default_rng(seed).multinomial(groups, np.full(groups, 1 / groups), size=resamples)
    means = (sums @ drawn.T) / (sizes @ drawn.T)
    tail = 100 * (1 - confidence) / 2
    return np.percentile(means, [tail, 100 - tail], axis=-1)
