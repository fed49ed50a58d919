"""Verdicts: the port's differences against what PyTorch differs from itself by.

No number here says how exact a port must be. The floor does: the reference computed once more in other ways (a wider
type, sums in another order, rounded products where the accelerator rounds them), each measured on the same inputs. The
port may differ from the reference by a small multiple of the largest of these, statistic by statistic: it is one more
way of computing the same, not the same as any of those measured. The multiples were calibrated on sound ports
(docs/validation.md has the measured spread).
"""

from __future__ import annotations

from jaxmllm.validation.distributions import DTYPES, Errors, spacing
from jaxmllm.validation.report import Floor

# What the port may differ by, as multiples of the floor: the mean is steady, a largest difference is not.
ALLOWED = {"mean": 3.0, "p99": 4.0, "max": 8.0}
# Where PyTorch agrees with itself to the bit, parts of the step of the type at the tensor's scale: what a result that
# is rounded once in another way may differ by.
STEP = {"mean": 0.25, "p99": 0.5, "max": 1.0}

# In types narrower than float32 the rounding of every number hides what all numbers of a row have in common, such as a
# norm's statistic that was rounded too. So there the gain of rows counts as well, in multiples of the floor's or, where
# that is smaller, of this part of the type's step at 1.
ALLOWED_GAIN, STEP_GAIN = 3.0, 1 / 64

# Other ways that stand for what a backend does to products in float32, by backend and JAX's matmul precision. Those of
# every backend are the wider type and the other order.
ALWAYS = ("float64", "float32", "other order")
ROUNDED_PRODUCTS = {
    ("gpu", "default"): ("tf32 products",),
    ("gpu", "high"): ("tf32 products",),
    ("tpu", "default"): ("bf16 products",),
    ("tpu", "high"): ("bf16x3 products",),
}


def ways_that_count(backend: str, precision: str) -> tuple[str, ...]:
    """The ways whose differences a port may show.

    Args:
      backend: JAX's: ``cpu``, ``gpu`` or ``tpu``.
      precision: JAX's matmul precision: ``default``, ``high`` or ``highest``.

    Source: jax.default_matmul_precision. On a GPU, ``default`` and ``high`` may use TF32; on a TPU, ``default`` rounds
    operands to bfloat16 and ``high`` takes three such products.
    """
    return (*ALWAYS, *ROUNDED_PRODUCTS.get((backend, precision), ()))


def tolerance(floor: Floor, scale: float, dtype: str, ways: tuple[str, ...] = ALWAYS) -> dict[str, float]:
    """What a port may differ by: ``mean``, ``p99`` and ``max`` of the absolute differences.

    Args:
      floor: what PyTorch differs from itself by.
      scale: root mean square of the reference.
      dtype: that both computed in.
      ways: those of the floor that count; see ``ways_that_count``.
    """
    step = float(spacing(scale, DTYPES[dtype]))
    counted = [errors for way, errors in floor.of.items() if way in ways]
    return {
        name: allowed * max([STEP[name] * step, *(getattr(errors, name) for errors in counted)])
        for name, allowed in ALLOWED.items()
    }


def ratio(errors: Errors, floor: Floor, dtype: str, ways: tuple[str, ...] = ALWAYS) -> float:
    """The differences over what is allowed, the worst of the statistics: above 1, the component departs."""
    limits = tolerance(floor, errors.scale, dtype, ways)
    if dtype != "float32":
        step = STEP_GAIN * float(spacing(1.0, DTYPES[dtype]))
        limits["gain"] = ALLOWED_GAIN * max([step, *(each.gain for way, each in floor.of.items() if way in ways)])
    return max(getattr(errors, name) / limit if limit else float("inf") for name, limit in limits.items())
