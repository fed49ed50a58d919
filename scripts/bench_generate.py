"""Times generation and weighs its peak memory, jaxmllm against Hugging Face's ``generate``, on one random LLaVA.

    python scripts/bench_generate.py                    # 12 layers of width 512, then 24 of width 1,024
    python scripts/bench_generate.py --sizes quick      # the first alone; some minutes
    python scripts/bench_generate.py --layers 2 --width 128 --patches 6 --repeats 1   # to try the script

Greedy, float32, one image a prompt (651 positions), batch 1 and 8, nothing stops early:

=========  ============================================================================================================
``torch``  ``LlavaForConditionalGeneration.generate`` with sdpa and its default cache, under ``inference_mode``
``jax``    ``jaxmllm.generate``
=========  ============================================================================================================

Prefill is the time to one token, from arrays of the host: vision tower, prompt, first token. Decoding is the time to N
tokens less that to one, over N - 1 steps. Both take turns, round by round, and medians are reported. Before that, every
token and its log-probability are compared; where two tokens are as likely but for rounding, a row ends its comparison.

Each peak is taken in a process of its own, over a whole generation of N tokens that follows one like it, and does not
hold what was there before, that is weights, programs and whatever else stays. Without an accelerator it is of main
memory, and needs Linux. On one it is of device memory; JAX cannot set its mark back there, so that its peak includes
what compiling takes to try out kernels. There, float32 means float32 throughout (no TF32).

Run it on an idle machine: a busy neighbour slows torch many times and JAX hardly (``cores_busy_elsewhere``). The last
line is JSON.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import torch
import typer
from bench_models import (
    FULL,
    QUICK,
    Load,
    Shape,
    added_peak,
    make_prompt,
    peak_of,
    save_checkpoint,
    use_all_cores,
    versions,
)
from rich.console import Console
from rich.table import Table
from transformers import LlavaForConditionalGeneration

import jaxmllm

CONTESTANTS = ("torch", "jax")
BATCHES = (1, 8)
PREFIX = 35  # tokens before the image, as in LLaVA-1.5's prompt; with 576 of the image and 40 behind it S is 651
TOLERANCE = 1e-3  # of log-probabilities; the library promises 1e-4 of logits
log = Console(stderr=True)

Prompts = dict[str, np.ndarray]


class Sizes(enum.StrEnum):
    """Which models are measured."""

    QUICK = "quick"
    FULL = "full"
    BOTH = "both"

    def shapes(self) -> Iterator[tuple[str, Shape]]:
        """Names and shapes of the models."""
        return ((name, shape) for name, shape in (("quick", QUICK), ("full", FULL)) if self in (name, "both"))


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one contestant at one batch size, a round an element.

    Attributes:
      first: to one token.
      whole: to all tokens.
    """

    first: list[float] = dataclasses.field(default_factory=list)
    whole: list[float] = dataclasses.field(default_factory=list)

    def rates(self, batch: int, positions: int, new_tokens: int) -> dict[str, float]:
        """Medians: seconds to the first token and a step after it, prompt positions and new tokens a second."""
        prefill = float(np.median(self.first))
        step = float(np.median(np.subtract(self.whole, self.first))) / (new_tokens - 1)
        if step <= 0:
            sys.exit(f"{new_tokens} tokens took no longer than one; give more --new-tokens")
        return {
            "prefill_s": prefill,
            "step_s": step,
            "prefill_tokens_per_s": batch * positions / prefill,
            "decode_tokens_per_s": batch / step,
        }


def choose_device() -> str:
    """Where torch runs: with JAX, on the accelerator if JAX has one. Both keep to plain float32 there, and JAX leaves
    memory to torch."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # read when JAX starts its backend
    if jax.default_backend() == "cpu":
        return "cpu"
    if not torch.cuda.is_available():
        sys.exit(
            f"JAX runs on {jax.default_backend()} and this build of torch on the CPU alone: set JAX_PLATFORMS=cpu, or "
            "install torch with CUDA"
        )
    jax.config.update("jax_default_matmul_precision", "highest")
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False  # of convolutions; on by default
    return "cuda"


def load_torch(folder: Path, device: str) -> LlavaForConditionalGeneration:
    """Hugging Face's model, which stops at no token."""
    model = LlavaForConditionalGeneration.from_pretrained(folder, attn_implementation="sdpa").eval().to(device)
    model.generation_config.eos_token_id = None
    return model


def generate_torch(model: Any, prompts: Prompts, new_tokens: int, **options: Any) -> Any:
    """Hugging Face's ``generate``; done when it returns, since it reads every token to see whether all have stopped,
    and on a device waits for it."""
    arrays: dict[str, Any] = {name: torch.from_numpy(array).to(model.device) for name, array in prompts.items()}
    arrays["input_ids"] = arrays["input_ids"].long()
    with torch.inference_mode():
        out = model.generate(**arrays, do_sample=False, min_new_tokens=new_tokens, max_new_tokens=new_tokens, **options)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return out


def generate_jax(model: jaxmllm.Model, prompts: Prompts, new_tokens: int) -> jaxmllm.Generated:
    """jaxmllm's ``generate``; done when it returns, with its tokens on the host."""
    return jaxmllm.generate(model, prompts, max_new_tokens=new_tokens, stop_tokens=())


def make_runner(contestant: str, folder: Path, device: str) -> Callable[..., Any]:
    """One contestant over a checkpoint, which is read in its own framework alone."""
    if contestant == "torch":
        return functools.partial(generate_torch, load_torch(folder, device))
    return functools.partial(generate_jax, jaxmllm.load(folder))


def compare(logits: torch.Tensor, ours: jaxmllm.Generated) -> tuple[float, int]:
    """The largest difference between two greedy generations.

    Up to a row's first token that is not torch's, whose context is still the same, log-probabilities are compared; at
    that token also how much likelier torch thinks its own. Behind it the row says nothing.

    Args:
      logits: of torch, ``[B, N, V]``.
      ours: of jaxmllm.

    Returns:
      The difference, in natural logarithms; and the number of rows with such a token.
    """
    if logits.shape[:2] != ours.tokens.shape:
        sys.exit(f"torch generated {tuple(logits.shape[:2])} tokens, jaxmllm {ours.tokens.shape}")
    theirs = logits.log_softmax(-1)
    best, token = theirs.max(-1)
    of_ours = theirs.gather(-1, torch.tensor(ours.tokens).long()[..., None])[..., 0].numpy()
    parted = token.numpy() != ours.tokens
    same_context = np.cumsum(parted, axis=1) - parted == 0
    gaps = np.maximum(np.abs(of_ours - ours.log_probabilities), best.numpy() - of_ours)
    return float(gaps[same_context].max()), int(parted.any(axis=1).sum())


def time_all(
    folder: Path, prompts: dict[int, Prompts], repeats: int, new_tokens: int, device: str
) -> tuple[dict[int, dict[str, Timing]], dict[int, tuple[float, int]]]:
    """Seconds by batch size and contestant, and what ``compare`` says by batch size."""
    runners = {contestant: make_runner(contestant, folder, device) for contestant in CONTESTANTS}
    timings: dict[int, dict[str, Timing]] = {}
    differences: dict[int, tuple[float, int]] = {}
    for batch, of_batch in prompts.items():
        for run in runners.values():  # compiles and warms up
            run(of_batch, 1)
        theirs = runners["torch"](of_batch, new_tokens, return_dict_in_generate=True, output_logits=True)
        logits = torch.stack([step.float().cpu() for step in theirs.logits], dim=1)
        differences[batch] = compare(logits, runners["jax"](of_batch, new_tokens))
        del theirs, logits
        timings[batch] = {contestant: Timing() for contestant in CONTESTANTS}
        for number in range(repeats):
            for contestant, run in runners.items():
                timing = timings[batch][contestant]
                timing.first.append(seconds_of(functools.partial(run, of_batch, 1)))
                timing.whole.append(seconds_of(functools.partial(run, of_batch, new_tokens)))
                log.print(
                    f"batch {batch}, round {number + 1} of {repeats}: {contestant} {timing.first[-1]:.2f} s to 1 token,"
                    f" {timing.whole[-1]:.2f} s to {new_tokens}"
                )
    return timings, differences


def seconds_of(run: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def measure_peak(contestant: str, run: Callable[[], object], device: str) -> int:
    """Bytes that a call takes at its peak, of main memory or of the device's; for a process that does nothing else."""
    if device == "cpu":
        return added_peak(run)
    if contestant == "torch":
        run()
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    before = jax.local_devices()[0].memory_stats()["bytes_in_use"]
    run()
    return jax.local_devices()[0].memory_stats()["peak_bytes_in_use"] - before


def measure(name: str, shape: Shape, repeats: int, new_tokens: int, device: str) -> dict[str, Any]:
    """What there is to say of one size; prints its table."""
    prompts = {batch: make_prompt(shape, 1, PREFIX, batch) for batch in BATCHES}
    positions = prompts[1]["input_ids"].shape[1]
    log.print(f"[bold]{name}[/]: {shape.layers} layers of width {shape.width}, {positions} positions")
    load = Load()
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        save_checkpoint(shape, folder)
        timings, differences = time_all(folder, prompts, repeats, new_tokens, device)
        busy = load.elsewhere()  # of the timed part; memory does not care
        gc.collect()
        options = ("--patches", str(shape.patches), "--new-tokens", str(new_tokens))
        batches: dict[str, dict[str, Any]] = {}
        for batch in BATCHES:
            rates = {
                contestant: timing.rates(batch, positions, new_tokens)
                | {"peak_gb": peak_of(__file__, f"{contestant}:{batch}:{folder}", *options) / 1e9}
                for contestant, timing in timings[batch].items()
            }
            ratios = {figure: rates["jax"][figure] / rates["torch"][figure] for figure in rates["jax"]}
            difference, parted = differences[batch]
            batches[str(batch)] = {
                **rates,
                "ratio_jax_to_torch": ratios,
                "max_abs_diff": difference,
                "rows_parted_by_rounding": parted,
            }
    print_table(name, shape, positions, batches)
    return {**dataclasses.asdict(shape), "positions": positions, "cores_busy_elsewhere": busy, "batches": batches}


def print_table(name: str, shape: Shape, positions: int, batches: dict[str, dict[str, Any]]) -> None:
    """Rates, peaks and ratios, a column each for every batch size."""
    table = Table(title=f"{name}: {shape.layers} layers of width {shape.width}, prompts of {positions} positions")
    table.add_column("")
    figures = {
        "prefill, tokens/s": ("prefill_tokens_per_s", ".0f"),
        "decode, tokens/s": ("decode_tokens_per_s", ".1f"),
        "peak, GB": ("peak_gb", ".3f"),
    }
    for batch in batches:
        for head in figures:
            table.add_column(f"{head}\nbatch {batch}", justify="right")
    rows = {
        "torch": ("torch", None),
        "jax": ("jax", None),
        "jax / torch": ("ratio_jax_to_torch", ".2f"),
    }
    for label, (key, style) in rows.items():
        cells = [
            format(of_batch[key][figure], style or own_style)
            for of_batch in batches.values()
            for figure, own_style in figures.values()
        ]
        table.add_row(label, *cells)
    Console(width=120).print(table)  # as wide where nobody watches


def bench(
    sizes: Annotated[Sizes, typer.Option(help="Which models.")] = Sizes.BOTH,
    repeats: Annotated[int, typer.Option(help="Rounds; medians are taken over them.", min=1)] = 3,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate.", min=2)] = 33,
    layers: Annotated[int, typer.Option(help="Decoder layers, instead of the size's.")] = 0,
    width: Annotated[int, typer.Option(help="Decoder width, a multiple of 64, instead of the size's.")] = 0,
    patches: Annotated[int, typer.Option(help="Patches a side of an image, instead of 24.")] = 0,
    peak: Annotated[
        str, typer.Option(hidden=True, help="CONTESTANT:BATCH:FOLDER; what the script calls itself with.")
    ] = "",
) -> None:
    """Prints a table a model, then one JSON line; fails where generations differ by more than rounding."""
    threads = use_all_cores()
    device = choose_device()
    if peak:
        contestant, batch, where = peak.split(":", 2)
        prompts = make_prompt(QUICK.resized(patches=patches), 1, PREFIX, int(batch))
        run = make_runner(contestant, Path(where), device)
        print(measure_peak(contestant, functools.partial(run, prompts, new_tokens), device))
        return
    measured = {
        name: measure(name, shape.resized(layers, width, patches), repeats, new_tokens, device)
        for name, shape in sizes.shapes()
    }
    result = {
        "device": device if device == "cpu" else torch.cuda.get_device_name(),
        "new_tokens": new_tokens,
        "repeats": repeats,
        "sizes": measured,
        "versions": versions(),
        "threads": threads,
    }
    print(json.dumps(result))
    for name, of_size in measured.items():
        for batch, of_batch in of_size["batches"].items():
            if not of_batch["max_abs_diff"] <= TOLERANCE:
                sys.exit(
                    f"{name}, batch {batch}: generations differ by {of_batch['max_abs_diff']:.1e} in log-probability, "
                    f"more than {TOLERANCE:.0e}"
                )


if __name__ == "__main__":
    typer.run(bench)
