"""The ways in which a norm goes wrong."""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxmllm.validation.diagnosis.case import Case
from jaxmllm.validation.diagnosis.hypotheses import Change, Study, setting, study
from jaxmllm.validation.diagnosis.parts import Norm
from jaxmllm.validation.diagnosis.sample import Sample, distance

EPSILONS = (1e-5, 1e-6, 1e-12, 1e-8, 1e-4, 1e-3, 1e-2, 1e-7, 1e-10, 0.0)
_CALL = "jaxmllm.models.layers.Builder.rms_norm, layer_norm"


def _other_kind(part: Norm) -> Norm:
    """RMSNorm for LayerNorm, and the reverse."""
    return dataclasses.replace(part, centred=not part.centred)


def _other_scale(part: Norm) -> Norm | None:
    if part.other is None:
        return None
    return dataclasses.replace(part, scale=part.other[0], bias=part.other[1])


NORM_CHANGES = (
    setting("no norm at all", "the call of the norm", passes=0),
    setting("norm applied twice", "the call of the norm", passes=2),
    Change(
        "norm scale missing",
        lambda part: dataclasses.replace(part, scale=np.ones_like(part.scale)),
        "the norm's scale leaf",
    ),
    Change("norm scale plus one", lambda part: dataclasses.replace(part, scale=1 + part.scale), _CALL),
    Change("norm scale minus one", lambda part: dataclasses.replace(part, scale=part.scale - 1), _CALL),
    Change(
        "scale of the layer's other norm (attention_norm and mlp_norm swapped)",
        _other_scale,
        "attention_norm/scale, mlp_norm/scale",
        both_ways=True,
    ),
    Change(
        "norm bias dropped", lambda part: None if part.bias is None else dataclasses.replace(part, bias=None), _CALL
    ),
    Change("mean subtracted (LayerNorm) or not (RMSNorm), the other way round", _other_kind, _CALL),
)
ROUNDED_NORMS = tuple(
    change
    for kind in ("bfloat16", "float16")
    for change in (
        setting(f"norm statistics in {kind}", _CALL, round_input=kind, rounding=kind),
        setting(f"norm sums rounded to {kind}", _CALL, rounding=kind),
        setting(f"norm input rounded to {kind}", _CALL, round_input=kind),
        setting(f"normed numbers rounded to {kind} before the scale", _CALL, round_normed=kind),
    )
)


def norm_changes(part: Norm, sample: Sample, where: str) -> tuple[Change, ...]:
    """All changes of a norm, its epsilon solved for among them.

    Args:
      part: the norm.
      sample: of what it gives.
      where: the config field of its epsilon.
    """

    def with_epsilon(epsilon: float) -> Change:
        name = f"norm epsilon {epsilon:.4g}"
        return Change(name, lambda part: dataclasses.replace(part, epsilon=epsilon), where)

    usual = [with_epsilon(epsilon) for epsilon in EPSILONS if epsilon != part.epsilon]
    # one that is not usual
    found = [x for x in solve_epsilon(part, sample) if not any(abs(x - epsilon) <= 0.01 * x for epsilon in EPSILONS)]
    solved = [with_epsilon(epsilon) for epsilon in found]
    return (*usual, *NORM_CHANGES, *solved, *ROUNDED_NORMS)


def solve_epsilon(part: Norm, sample: Sample) -> list[float]:
    """The epsilons with which the norm would give the port's and the reference's array."""
    plain = part()
    if plain.shape != sample.got.shape or not np.isfinite(plain).all():
        return []
    x = part.x - part.x.mean(axis=-1, keepdims=True) if part.centred else part.x
    square = np.mean(x**2, axis=-1)
    shift = 0.0 if part.bias is None else part.bias
    found = []
    for array in (sample.got, sample.expected):
        if distance(plain, array, sample.mask) < 1e-3 * sample.difference or not np.isfinite(array).all():
            continue
        # how much longer or shorter the normed row is than by the plain epsilon
        a, b = plain - shift, array - shift
        length = np.sum(a * b, axis=-1) / np.maximum(np.sum(a * a, axis=-1), 1e-300)
        with np.errstate(divide="ignore"):
            epsilon = (square + part.epsilon) / length**2 - square
        rows = sample.mask.all(axis=-1) & np.isfinite(epsilon)
        if rows.any():
            found.append(float(np.median(epsilon[rows])))
    return [float(f"{epsilon:.4g}") for epsilon in found if epsilon > 0]


def norm_of(
    case: Case, x: np.ndarray, path: str, epsilon: float, centred: bool, other: str | None = None
) -> Norm | None:
    """A norm with the port's weights; ``None`` where they are not at hand.

    Args:
      case: the departure.
      x: what is normed.
      path: of its leaves; ``other`` those of the layer's other norm.
      epsilon, centred: see ``Norm``.
    """
    scale, bias = case.leaf(f"{path}/scale"), case.leaf(f"{path}/bias") if centred else None
    if scale is None:
        return None
    others = None if other is None else case.leaf(f"{other}/scale")
    pair = (
        None if others is None else (others.astype(np.float64), _wide(case.leaf(f"{other}/bias") if centred else None))
    )
    return Norm(x, scale.astype(np.float64), _wide(bias), epsilon, centred, pair)


def study_norm(part: Norm, sample: Sample, where: str) -> Study:
    """Hypotheses of a norm."""
    return study(sample, part, norm_changes(part, sample, where))


def _wide(array: np.ndarray | None) -> np.ndarray | None:
    return None if array is None else array.astype(np.float64)
