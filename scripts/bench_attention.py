"""Times a clean forward pass and weighs its peak memory, with and without captured attention, JAX against PyTorch.

    python scripts/bench_attention.py                                            # 12 layers of width 512; some minutes
    python scripts/bench_attention.py --layers 2 --width 128 --patches 6 --repeats 1   # to try the script

Batch 1, float32, one image (S = 651) and five (S = 2,951), logits at the last position alone:

==================  ===================================================================================================
``torch_sdpa``      Hugging Face's model with its fused attention, which gives no weights away
``torch_eager``     the same with ``output_attentions=True``, the way to attention weights there
``jax``             jaxmllm
``jax_captured``    jaxmllm with the attention of the last token to the image captured at every layer
==================  ===================================================================================================

Seconds are medians of rounds in which all take turns. Run it on an idle machine: a busy neighbour slows torch many
times and JAX hardly (``cores_busy_elsewhere``).

Peaks do not come down again, so each is taken in a process of its own: the checkpoint is loaded; one pass of the same
length compiles and warms up; what was freed is handed back to the system; the kernel's mark of the highest resident
size is set back; then a second pass runs. Its peak is the mark less the resident size before, so weights, compilation
and loading are not in it. (Without the setting back, the mark would be that of loading or compiling, often the higher
one.) Needs Linux. The last line is JSON.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from bench_models import QUICK, Load, added_peak, make_prompt, peak_of, save_checkpoint, use_all_cores, versions
from rich.console import Console
from rich.table import Table
from transformers import LlavaForConditionalGeneration

import jaxmllm
from jaxmllm.models.capture import ATTENTION, Capture

IMAGES = (1, 5)
PREFIX = {1: 35, 5: 31}  # tokens before the images; with 40 behind them S is 651 and 2,951
VARIANTS = ("torch_sdpa", "torch_eager", "jax", "jax_captured")
CAPTURE = Capture.attention(rows="last", keys="image")
TOLERANCE = 1e-3  # of logits and attention weights; the library promises 1e-4 of logits
RATIO_TARGET = 1.2  # of a clean pass to that of fused attention
CAPTURE_TARGET = 0.2  # GB that capturing may add to the peak
log = Console(stderr=True)

Prompt = dict[str, np.ndarray]
Result = tuple[np.ndarray, np.ndarray | None]  # logits [V]; attention [L, N] of the last token to the image, if any


def run_torch(model: LlavaForConditionalGeneration, prompt: Prompt, eager: bool) -> Result:
    """A pass of Hugging Face's model; ``eager`` also gives the attention weights, of which the rows wanted are kept."""
    model.set_attn_implementation("eager" if eager else "sdpa")
    ids, pixels = (torch.from_numpy(prompt[name]).clone() for name in ("input_ids", "pixel_values"))
    with torch.inference_mode():
        out = model(
            input_ids=ids.long(), pixel_values=pixels, use_cache=False, logits_to_keep=1, output_attentions=eager
        )
    if not eager:
        return out.logits[0, -1].numpy(), None
    image = ids[0] == model.config.image_token_id
    return out.logits[0, -1].numpy(), torch.stack([w[0, :, -1, image].mean(0) for w in out.attentions]).numpy()


def run_jax(model: jaxmllm.Model, prompt: Prompt, captured: bool) -> Result:
    """A pass of jaxmllm."""
    out = model.forward(model.params, prompt, capture=CAPTURE if captured else None, logits_at="last")
    attention = np.asarray(out.captured[ATTENTION])[:, 0, 0] if captured else None
    return np.asarray(out.logits)[0, 0], attention


def make_runner(variant: str, folder: Path) -> Callable[[Prompt], Result]:
    """One variant over a checkpoint, which is read in its own framework alone."""
    if variant.startswith("torch"):
        model = LlavaForConditionalGeneration.from_pretrained(folder, attn_implementation="sdpa").eval()
        return functools.partial(run_torch, model, eager=variant == "torch_eager")
    return functools.partial(run_jax, jaxmllm.load(folder), captured=variant == "jax_captured")


def time_all(folder: Path, prompts: dict[int, Prompt], repeats: int) -> tuple[dict, dict]:
    """Medians by images and variant, in seconds; and the largest differences between torch and JAX by images."""
    runners: dict[str, Callable[[Prompt], Result]] = {variant: make_runner(variant, folder) for variant in VARIANTS}
    seconds: dict[int, dict[str, float]] = {}
    differences: dict[int, float] = {}
    for images, prompt in prompts.items():
        results = {variant: run(prompt) for variant, run in runners.items()}  # compiles and warms up
        logits = [result[0] for result in results.values()]
        attention = [results[variant][1] for variant in ("torch_eager", "jax_captured")]
        gaps = [np.max(np.abs(other - logits[0])) for other in logits[1:]]
        gaps.append(np.max(np.abs(np.subtract(*attention))))  # type: ignore[arg-type]
        differences[images] = float(np.max(gaps))
        rounds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
        for number in range(repeats):
            for variant, run in runners.items():
                began = time.perf_counter()
                run(prompt)
                rounds[variant].append(time.perf_counter() - began)
                log.print(f"{images} image(s), round {number + 1} of {repeats}: {variant} {rounds[variant][-1]:.2f} s")
        seconds[images] = {variant: float(np.median(spent)) for variant, spent in rounds.items()}
    return seconds, differences


def print_table(lengths: dict[int, int], seconds: dict, peaks: dict) -> None:
    """Seconds, ratio to fused attention, and peaks."""
    table = Table(title="A clean pass, batch 1")
    table.add_column("")
    for images in IMAGES:
        for head in (f"s, S = {lengths[images]}", "times sdpa", "peak, GB"):
            table.add_column(head, justify="right")
    for variant in VARIANTS:
        cells = []
        for images in IMAGES:
            spent = seconds[images][variant]
            cells += [f"{spent:.3f}", f"{spent / seconds[images]['torch_sdpa']:.2f}", f"{peaks[images][variant]:.3f}"]
        table.add_row(variant, *cells)
    Console(width=120).print(table)  # as wide where nobody watches


def bench(
    repeats: Annotated[int, typer.Option(help="Rounds; medians are taken over them.", min=1)] = 5,
    layers: Annotated[int, typer.Option(help="Decoder layers.")] = 12,
    width: Annotated[int, typer.Option(help="Decoder width, a multiple of 64; by default 512.")] = 0,
    patches: Annotated[int, typer.Option(help="Patches a side of an image.")] = 24,
    peak: Annotated[
        str, typer.Option(hidden=True, help="VARIANT:IMAGES:FOLDER; what the script calls itself with.")
    ] = "",
) -> None:
    """Prints a table, then one JSON line with the targets beside what was reached; fails where results differ."""
    shape = QUICK.resized(layers, width, patches)
    threads = use_all_cores()
    if peak:
        variant, many, where = peak.split(":", 2)
        prompt = make_prompt(shape, int(many), PREFIX[int(many)])
        print(added_peak(functools.partial(make_runner(variant, Path(where)), prompt)))
        return
    load = Load()
    prompts = {images: make_prompt(shape, images, PREFIX[images]) for images in IMAGES}
    lengths = {images: prompt["input_ids"].shape[1] for images, prompt in prompts.items()}
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        save_checkpoint(shape, folder)
        seconds, differences = time_all(folder, prompts, repeats)
        busy = load.elsewhere()  # of the timed part; memory does not care
        peaks: dict[int, dict[str, float]] = {}
        for images in IMAGES:
            peaks[images] = {
                variant: peak_of(__file__, f"{variant}:{images}:{folder}", "--patches", str(shape.patches)) / 1e9
                for variant in VARIANTS
            }
            log.print(f"{images} image(s), peaks in GB: {peaks[images]}")

    def by_length(value_of: Callable[[int], Any]) -> dict[str, Any]:
        return {str(lengths[images]): value_of(images) for images in IMAGES}

    ratios = by_length(lambda images: seconds[images]["jax"] / seconds[images]["torch_sdpa"])
    extra = by_length(lambda images: peaks[images]["jax_captured"] - peaks[images]["jax"])
    result = {
        **dataclasses.asdict(shape),
        "lengths": list(lengths.values()),
        "repeats": repeats,
        "ratio_jax_to_sdpa": ratios,
        "ratio_captured_to_eager": by_length(
            lambda images: seconds[images]["jax_captured"] / seconds[images]["torch_eager"]
        ),
        "captured_extra_gb": extra,
        "peak_gb": by_length(lambda images: peaks[images]),
        "seconds": by_length(lambda images: seconds[images]),
        "targets": {"ratio_jax_to_sdpa": RATIO_TARGET, "captured_extra_gb": CAPTURE_TARGET},
        "reached": {
            "ratio_jax_to_sdpa": max(ratios.values()) <= RATIO_TARGET,
            "captured_extra_gb": max(extra.values()) <= CAPTURE_TARGET,
        },
        "max_abs_diff": by_length(lambda images: differences[images]),
        "versions": versions(),
        "threads": threads,
        "cores_busy_elsewhere": busy,
    }
    print_table(lengths, seconds, peaks)
    print(json.dumps(result))
    if not all(gap <= TOLERANCE for gap in differences.values()):
        sys.exit(f"logits or attention weights differ by more than {TOLERANCE:.0e}: {differences}")


if __name__ == "__main__":
    typer.run(bench)
