"""How many prompts are answered together: as many as memory holds, as the compiler itself counts it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from jaxmllm.decoding.generate import ending_of, room_for, row_keys, run_prompts, run_tokens
from jaxmllm.decoding.rules import OneByOne
from jaxmllm.decoding.sampling import Sampling
from jaxmllm.errors import InputError
from jaxmllm.memory import default_budget, gigabytes
from jaxmllm.models.capture import Capture
from jaxmllm.models.edits import Edits
from jaxmllm.models.sharding import context, put_rows

MOST_ROWS = 16


def batch_that_fits(
    model: Any,
    inputs: Mapping[str, Any],
    max_new_tokens: int,
    *,
    most: int = MOST_ROWS,
    sampling: Sampling | None = None,
    edits: Edits | None = None,
    budget: int | None = None,
) -> int:
    """The largest batch, ``most`` or a half, a quarter, ... of it, whose two programs need no more than the budget.

    Both programs are compiled for the purpose, and ``generate`` then runs these very programs: where the first size
    fits, as on most machines, nothing is compiled that is not run.

    Args:
      model: a loaded model.
      inputs: one prompt, from ``model.prepare``: the longest, with the largest image.
      max_new_tokens, sampling, edits: as they will be given to ``generate``.
      most: the largest batch that is tried.
      budget: bytes of device memory, weights included; by default what the device grants.

    Raises:
      InputError: not even one prompt fits, or ``inputs`` hold several.
    """
    if len(inputs["input_ids"]) != 1:
        raise InputError(f"inputs hold {len(inputs['input_ids'])} prompts; expected the one to be measured")
    budget = default_budget() if budget is None else budget
    rows = most
    while True:
        needed = bytes_needed(model, repeat_rows(inputs, rows), max_new_tokens, sampling, edits)
        if needed <= budget:
            return rows
        if rows == 1:
            raise InputError(
                f"one prompt needs {gigabytes(needed)} and the budget is {gigabytes(budget)}; raise the budget, use a "
                "smaller dtype, or ask for fewer new tokens"
            )
        rows = max(1, rows // 2)


def bytes_needed(
    model: Any, inputs: Mapping[str, Any], max_new_tokens: int, sampling: Sampling | None, edits: Edits | None
) -> int:
    """Bytes that the hungrier of the two programs takes: weights, inputs, results and what it needs meanwhile."""
    checked, room = put_rows(model.as_inputs(inputs, bucketed=True), model.mesh), room_for(max_new_tokens)
    key = None if sampling is None else jax.random.key(0)
    keys = row_keys(len(checked.input_ids), sampling, key, None)
    try:
        with context(model.mesh):
            prompts = run_prompts.lower(model.graphdef, model.params, checked, edits, Capture(), room)
            compiled = prompts.compile()
            shapes, cache = prompts.out_info if model.mesh is None else laid_out(prompts.out_info, compiled)
            tokens = run_tokens.lower(
                model.graphdef,
                model.params,
                shapes,
                cache,
                edits,
                OneByOne(sampling),
                keys,
                ending_of(model),
                np.int32(max_new_tokens),
                room,
            ).compile()
            return max(_total(program.memory_analysis()) for program in (compiled, tokens))
    except jax.errors.JaxRuntimeError as error:
        # a TPU's compiler refuses what cannot fit
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return np.iinfo(np.int64).max


def laid_out(results: Any, program: Any) -> Any:
    """Shapes of a compiled program's results, laid over the mesh as it leaves them."""
    return jax.tree.map(
        lambda shape, layout: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=layout),
        results,
        program.output_shardings,
    )


def _total(analysis: Any) -> int:
    sizes = (analysis.argument_size_in_bytes, analysis.output_size_in_bytes, analysis.temp_size_in_bytes)
    return sum(sizes) - analysis.alias_size_in_bytes


def repeat_rows(inputs: Mapping[str, Any], rows: int) -> dict[str, Array | np.ndarray]:
    """One prompt so many times; every array of a processor has a leading axis of prompts, images or patches."""
    return {name: np.concatenate([np.asarray(value)] * rows) for name, value in inputs.items()}
