"""What the benchmarks share: random LLaVA checkpoints of a given shape, questions about random images, peaks of memory.

Needs the test extra: transformers draws the weights with torch, jaxmllm reads them from the folder it writes.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers
from transformers import AutoConfig, LlavaForConditionalGeneration

VOCABULARY = 32_064
IMAGE_TOKEN = 32_000
PATCH = 14
ANSWER = 2  # tokens
QUESTION = 40  # tokens, those of the answer included
SPOILS = 0.1  # cores kept busy by other processes


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a LLaVA. Images are squares of patches of 14 pixels; 24 patches a side give the 336 pixels and 576 image
    tokens of LLaVA-1.5."""

    layers: int
    width: int
    heads: int
    intermediate: int
    vision_layers: int
    vision_width: int
    patches: int = 24

    @property
    def image_tokens(self) -> int:
        """Tokens of one image."""
        return self.patches**2

    @property
    def image_size(self) -> int:
        """Pixels a side."""
        return self.patches * PATCH

    def resized(self, layers: int = 0, width: int = 0, patches: int = 0) -> Shape:
        """The shape with other sizes where they are given, so that a script can be tried in seconds."""
        changes = {"layers": layers, "width": width, "patches": patches}
        if width:
            changes |= {"intermediate": 8 * width // 3, "heads": max(1, width // 64)}
        return dataclasses.replace(self, **{name: value for name, value in changes.items() if value})


# Vision tower and projector do about 5% of a forward pass's work (products of matrices, counted at S = 651 without the
# output head), as they do in LLaVA-1.5-7B: a larger share would flatter whatever encodes an image only once.
QUICK = Shape(layers=12, width=512, heads=8, intermediate=1376, vision_layers=4, vision_width=192)
FULL = Shape(layers=24, width=1024, heads=16, intermediate=2736, vision_layers=8, vision_width=384)


def make_torch(shape: Shape, seed: int = 0) -> LlavaForConditionalGeneration:
    """A random model in float32. The initial weights of a few hundredths are spread, so that layers do matter and
    log-probabilities move when the image is hidden."""
    config: Any = AutoConfig.for_model(
        "llava",
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-2,
        text_config={
            "model_type": "llama",
            "vocab_size": VOCABULARY,
            "hidden_size": shape.width,
            "intermediate_size": shape.intermediate,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.heads,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
        },
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": shape.vision_width,
            "intermediate_size": 4 * shape.vision_width,
            "num_hidden_layers": shape.vision_layers,
            "num_attention_heads": max(1, shape.vision_width // 64),
            "image_size": shape.image_size,
            "patch_size": PATCH,
        },
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.7 / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 0.1
            parameter.add_(torch.randn_like(parameter) * spread)
    return model


@dataclasses.dataclass(frozen=True)
class Questions:
    """Questions with their answers, all of one length.

    Attributes:
      ids: ``[Q, S]``: prefix, image placeholders, question, answer.
      images: ``[I, 3, Y, X]``, unlike ones.
      image_of: ``[Q]``: the image each question is about.
    """

    ids: np.ndarray
    images: np.ndarray
    image_of: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def is_image(self) -> np.ndarray:
        """``[S]``: which positions hold image tokens; the same ones in every question."""
        return self.ids[0] == IMAGE_TOKEN

    @property
    def answers(self) -> np.ndarray:
        """``[Q, ANSWER]``: the answers' tokens."""
        return self.ids[:, -ANSWER:]

    @property
    def answer_positions(self) -> np.ndarray:
        """``[ANSWER]``: the positions that predict them."""
        return np.arange(-ANSWER - 1, -1) + self.ids.shape[1]

    def part(self, rows: slice | list[int]) -> Questions:
        """Some of the questions, with the images that these are about."""
        images, image_of = np.unique(self.image_of[rows], return_inverse=True)
        return Questions(self.ids[rows], self.images[images], image_of)

    def prompts(self) -> dict[str, np.ndarray]:
        """The arrays that jaxmllm takes, as ``append_answers`` gives them: an image a question, repeated or not."""
        count = len(self)
        return {
            "input_ids": self.ids.astype(np.int32),
            "attention_mask": np.ones(self.ids.shape, np.int32),
            "pixel_values": self.images[self.image_of],
            "answer_ids": self.answers.astype(np.int32),
            "answer_positions": np.tile(self.answer_positions.astype(np.int32), (count, 1)),
        }


def make_questions(shape: Shape, count: int, an_image: int, prefix: int, seed: int = 0) -> Questions:
    """Random questions, neighbours about one image; the prefix is the same in all, as a chat template's is.

    Args:
      shape: of the model.
      count: Q.
      an_image: questions an image.
      prefix: tokens before the image.
      seed: of everything random.
    """
    rng = np.random.default_rng(seed)
    before = np.tile(rng.integers(3, IMAGE_TOKEN, prefix), (count, 1))
    placeholders = np.full((count, shape.image_tokens), IMAGE_TOKEN)
    after = rng.integers(3, IMAGE_TOKEN, (count, QUESTION))
    image_of = np.arange(count) // an_image
    size = (int(image_of[-1]) + 1, 3, shape.image_size, shape.image_size)
    images = rng.normal(size=size).astype(np.float32)
    return Questions(np.concatenate([before, placeholders, after], axis=1), images, image_of)


def make_prompt(shape: Shape, images: int, prefix: int, batch: int = 1, seed: int = 0) -> dict[str, np.ndarray]:
    """Prompts for jaxmllm without an answer: each has text, its ``images``, ``QUESTION`` tokens of text; all differ."""
    rng = np.random.default_rng(seed)
    words = [rng.integers(3, IMAGE_TOKEN, (batch, length)) for length in (prefix, QUESTION)]
    placeholders = np.full((batch, images * shape.image_tokens), IMAGE_TOKEN)
    ids = np.concatenate([words[0], placeholders, words[1]], axis=1).astype(np.int32)
    pixels = rng.normal(size=(batch * images, 3, shape.image_size, shape.image_size)).astype(np.float32)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "pixel_values": pixels}


def use_all_cores() -> int:
    """Lets torch use every core, as XLA does; returns their number."""
    cores = os.cpu_count() or 1
    torch.set_num_threads(cores)
    return cores


class Load:
    """How busy other processes keep the machine, from the moment this is made."""

    def __init__(self) -> None:
        self.began, self.seconds = time.monotonic(), self.seconds_elsewhere()

    def elsewhere(self) -> float | None:
        """Cores that others kept busy, on average, with a warning if that spoils the figures; ``None`` where the system
        does not say."""
        if self.seconds is None:
            return None
        cores = ((self.seconds_elsewhere() or 0.0) - self.seconds) / (time.monotonic() - self.began)
        if cores > SPOILS:
            print(f"other processes kept {cores:.2f} cores busy: measure again on an idle machine", file=sys.stderr)
        return cores

    def seconds_elsewhere(self) -> float | None:
        """What all other processes have used of the cores since the machine started."""
        try:
            user, nice, system, _, _, *rest = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9])
        except OSError:
            return None
        return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])


def versions() -> dict[str, str]:
    """Versions of what is compared."""
    return {"jax": jax.__version__, "torch": torch.__version__, "transformers": transformers.__version__}


def save_checkpoint(shape: Shape, folder: Path) -> LlavaForConditionalGeneration:
    """Draws a model, writes it to a folder, and returns it."""
    model = make_torch(shape)
    model.save_pretrained(folder)
    return model


def added_peak(run: Callable[[], object]) -> int:
    """Bytes of main memory that a call takes at its peak, beyond what is there before; for a process that does nothing
    else. A first call compiles and warms up. Needs Linux."""
    run()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else what the first call freed would hide what the second one takes
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def resident(field: str) -> int:
    """A size of this process in bytes, by its name in Linux's status file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def peak_of(script: str, what: str, *options: str) -> int:
    """The bytes that ``script --peak what``, in a process of its own, prints last."""
    done = subprocess.run([sys.executable, script, "--peak", what, *options], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"the peak of {what} could not be taken:\n{done.stderr}")
    return int(done.stdout.splitlines()[-1])
