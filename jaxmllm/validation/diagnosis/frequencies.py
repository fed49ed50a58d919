"""Rotary frequencies read off the tables of cosines and sines, where the port's config does not say the right ones."""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxmllm.validation.diagnosis.case import Case
from jaxmllm.validation.diagnosis.rotary import rotary_of
from jaxmllm.validation.diagnosis.sample import distance
from jaxmllm.validation.report import Cause

_NEAR = 1e-3  # of one: ratios of frequencies nearer than this are taken for the same
_WHERE = "config: rope_theta, rope_parameters (rope_scaling); jaxmllm.models.text_config.read_rope"


@dataclasses.dataclass(frozen=True)
class Frequencies:
    """What turns ``[E / 2]``, in radians a position."""

    port: np.ndarray
    reference: np.ndarray

    def named(self) -> str:
        """What their ratio says of the base and the scaling rule."""
        ratio = self.port / self.reference
        if np.ptp(ratio) <= _NEAR * ratio.mean():
            return f"rotary scaling: all frequencies of the port are {ratio.mean():.4g} times the reference's"
        pairs = np.arange(len(ratio))
        slope = float(pairs @ np.log(ratio) / (pairs @ pairs))
        if np.abs(np.log(ratio) - slope * pairs).max() <= _NEAR:
            ours, theirs = (np.exp(-np.log(side[1] / side[0]) * len(pairs)) for side in (self.port, self.reference))
            return f"rotary base {ours:.6g} in the port, {theirs:.6g} in the reference (rope_theta, or dynamic scaling)"
        same = np.abs(ratio - 1) <= _NEAR
        if same[: int(same.sum())].all() and not same[-1]:
            return (
                f"rotary scaling of low frequencies alone (as llama3 and yarn do): from pair {int(same.sum())} on the "
                f"port's are other ones, the last {ratio[-1]:.4g} times the reference's"
            )
        return "rotary scaling: frequencies are other ones, not by one factor nor by another base"


def frequency_causes(case: Case) -> tuple[Cause, ...]:
    """Names how the frequencies of ``rotary`` differ.

    Returns:
      At most one cause: none where positions have several axes, or where the frequencies are not what differs.
    """
    rotary = rotary_of(case)
    positions = rotary.positions
    if case.component != "rotary" or positions.ndim != 2 or case.rows is not None:
        return ()
    at = tuple(index[0] for index in np.nonzero(positions == 1)) if (positions == 1).any() else None
    if at is None:
        return ()
    # a turn by one position is below half a circle, so that the angle is the frequency
    port, reference = (_angles(array[at].astype(np.float64)) for array in (case.got, case.expected))
    if min(port.min(), reference.min()) <= 0 or np.allclose(port, reference, rtol=_NEAR):
        return ()
    expected = case.expected.astype(np.float64)
    mask = np.broadcast_to(np.asarray(case.mask)[..., None], expected.shape) if case.mask.ndim == 2 else case.mask
    angles = np.tile(positions[..., None] * reference, 2)
    rebuilt = np.concatenate([np.cos(angles), np.sin(angles)], axis=-1) * _length(expected[at])
    difference = distance(case.got.astype(np.float64), expected, mask)
    explained = 1 - distance(rebuilt, expected, mask) / difference
    evidence = (
        f"radians a position, pair by pair: port {_few(port)}; reference {_few(reference)}; at all positions these "
        f"give {100 * explained:.4g}% of the difference"
    )
    return (Cause(Frequencies(port, reference).named(), evidence, float(np.clip(explained, 0, 1)), _WHERE),)


def _angles(row: np.ndarray) -> np.ndarray:
    cosine, sine = np.split(row, 2)
    half = len(cosine) // 2
    return np.arctan2(sine[:half], cosine[:half])


def _length(row: np.ndarray) -> float:
    """The factor on cosines and sines."""
    return float(np.sqrt(row[0] ** 2 + row[len(row) // 2] ** 2))


def _few(values: np.ndarray) -> str:
    return ", ".join(f"{value:.4g}" for value in values[:8]) + (", ..." if len(values) > 8 else "")
