"""Hypotheses that are computed: variations of a part of a layer, and which of them makes the difference go away."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from jaxmllm.validation.diagnosis.sample import Sample, distance
from jaxmllm.validation.report import Cause

CONFIRMED = 0.9  # share of the difference that a cause explains
PARTLY = 0.3  # from this share on, a variation is worth a line
AS_GOOD = 1.5  # times what is left with the best: what leaves no more explains as much
MEETS = 0.1  # of the difference: nearer than this, the plain computation meets an array


@dataclasses.dataclass(frozen=True)
class Change:
    """One mistake that a part of a layer may hold.

    Attributes:
      name: in a few words.
      apply: the part -> the part with the mistake; ``None`` where it cannot be made.
      where: what to look at.
      both_ways: made twice, it is undone, so that weights that hold it are mended by it.
    """

    name: str
    apply: Callable[[Any], Any]
    where: str = ""
    both_ways: bool = False


@dataclasses.dataclass(frozen=True)
class Variation:
    """A change of a certain part, with what it makes of the component.

    Attributes:
      change: the mistake.
      compute: the sampled component; ``None`` where it cannot be computed.
    """

    change: Change
    compute: Callable[[], np.ndarray | None]


@dataclasses.dataclass(frozen=True)
class Study:
    """A component's hypotheses.

    Attributes:
      sample: what they are measured on.
      correct: the component as it should be, by the port's weights and config.
      variations: the same with one mistake each, more likely ones first.
    """

    sample: Sample
    correct: Callable[[], np.ndarray]
    variations: tuple[Variation, ...]


def setting(name: str, where: str, **fields: Any) -> Change:
    """A change of fields of a part."""
    return Change(name, lambda part: dataclasses.replace(part, **fields), where)


def vary(part: Any, changes: Iterable[Change], compute: Callable[[Any], np.ndarray]) -> tuple[Variation, ...]:
    """The variations of a part.

    Args:
      part: as it should be.
      changes: mistakes to try.
      compute: part -> the sampled component.
    """

    def computed(change: Change) -> np.ndarray | None:
        changed = change.apply(part)
        return None if changed is None else compute(changed)

    return tuple(Variation(change, lambda change=change: computed(change)) for change in changes)  # type: ignore[misc]


def study(
    sample: Sample, part: Any, changes: Iterable[Change], compute: Callable[[Any], np.ndarray] = lambda part: part()
) -> Study:
    """The hypotheses of one part, which by default computes its component when it is called."""
    return Study(sample, lambda: compute(part), vary(part, changes, compute))


def tried(study: Study) -> tuple[Cause, ...]:
    """Tries all variations.

    Where the plain computation meets the reference, the port's code makes a mistake, and the variation that meets the
    port names it. Where it meets the port, the port computes what its weights and config say and these are wrong: the
    variation that meets the reference names what they should say.

    Returns:
      The variations that explain the difference, those first that explain most of it; where none does, those that
      explain a part of it.
    """
    sample, difference = study.sample, study.sample.difference
    if difference == 0:
        return ()
    plain = study.correct()
    to_got, to_expected = (distance(plain, other, sample.mask) for other in (sample.got, sample.expected))
    obeys = to_got <= MEETS * difference and to_got < to_expected
    target = sample.expected if obeys else sample.got
    found = []
    for variation in study.variations:
        with np.errstate(all="ignore"):  # a mistake may overflow
            array = variation.compute()
        if array is None or array.shape != sample.got.shape:
            continue
        left = distance(array, target, sample.mask)
        explained = _explained(left, difference)
        if explained >= PARTLY:
            cause = _cause(variation.change, explained, left, difference, to_got if obeys else None)
            found.append((left, cause))
    best = min((left for left, _ in found), default=0.0)
    # what is left of the best ones is noise, in which the order of the list decides
    good = [cause for left, cause in found if left <= AS_GOOD * best]
    if any(confirmed(cause) for cause in good):
        return tuple(good)
    rest = sorted((pair for pair in found if pair[0] > AS_GOOD * best), key=lambda pair: pair[0])
    return (*good, *(cause for _, cause in rest))


def _explained(left: float, difference: float) -> float:
    """Share of the difference that goes away; a difference without bound goes away where what is left has one."""
    if not np.isfinite(difference):
        return 1.0 if np.isfinite(left) else 0.0
    return max(0.0, 1.0 - left / difference)


def _cause(change: Change, explained: float, left: float, difference: float, obeys: float | None) -> Cause:
    gone = f"{100 * explained:.4g}% of the difference goes away: from {difference:.3g} to {left:.3g} (root mean square)"
    if obeys is None:
        return Cause(change.name, f"with {change.name} in the plain computation, {gone}", explained, change.where)
    side = (
        "in the port's weights" if change.both_ways else "in the reference, other than in the port's weights or config"
    )
    evidence = (
        f"the port computes what its own weights and config say (to {obeys:.2g}); with {change.name}, they give the "
        f"reference's array instead: {gone}"
    )
    return Cause(f"{change.name}: {side}", evidence, explained, change.where)


def confirmed(cause: Cause) -> bool:
    """Whether a cause explains a difference."""
    return cause.explained is not None and cause.explained >= CONFIRMED
