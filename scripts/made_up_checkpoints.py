"""Checkpoints of published architectures with made up weights: real proportions at about 300M parameters, or real size.

    python scripts/made_up_checkpoints.py NAME FOLDER [--full] [--layers N]

Weights are normal noise of sane size, written in bfloat16 under the names that files on the hub carry, in shards of a
gigabyte, so that memory does not grow with the model. The folder holds no processor files. Needs the test extra:
transformers says which tensors there are.
"""

from __future__ import annotations

import json
import math
import sys
import zlib
from pathlib import Path
from typing import Annotated, Any

import ml_dtypes
import numpy as np
import torch
import transformers
import typer
from rich.console import Console
from safetensors.numpy import save_file
from transformers import AutoConfig

ROOT = Path(__file__).resolve().parent.parent
SHARD = 10**9  # bytes of a file
BLOCK = 2**24  # numbers that are drawn; tensors are cut from them
log = Console(stderr=True)

# Of each family one architecture, and what makes it about 300M parameters: widths divided by four or so, fewer layers;
# head widths, ratios, patch sizes, vocabularies of LLaMA and everything else as published.
TEXT = {"hidden_size": 1024, "intermediate_size": 2752, "num_hidden_layers": 16, "num_attention_heads": 8}
VISION = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "image_size": 336}
SCALED: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # family: (published config, text config, vision config, Q-Former config)
    "llava": ("llava-1.5-7b-hf", {**TEXT, "num_key_value_heads": 8}, VISION, {}),
    "vipllava": ("vip-llava-7b-hf", {**TEXT, "num_key_value_heads": 8}, VISION, {}),
    "llava_next": (
        "llava-v1.6-mistral-7b-hf",
        {**TEXT, "num_key_value_heads": 2, "intermediate_size": 3584},
        {**VISION, "image_size": 168},
        {},
    ),
    "instructblip": (
        "instructblip-vicuna-7b",
        {**TEXT, "num_key_value_heads": 8, "num_hidden_layers": 12},
        {"hidden_size": 352, "intermediate_size": 1536, "num_attention_heads": 4, "num_hidden_layers": 39},
        {"hidden_size": 192, "intermediate_size": 768, "num_attention_heads": 3, "encoder_hidden_size": 352},
    ),
    "qwen2_vl": (
        "qwen2-vl-7b-instruct",
        {"hidden_size": 896, "intermediate_size": 4736, "num_hidden_layers": 14, "num_attention_heads": 7,
         "num_key_value_heads": 1},
        {"embed_dim": 320, "hidden_size": 896, "num_heads": 4},
        {},
    ),
    "qwen2_5_vl": (
        "qwen2.5-vl-7b-instruct",
        {"hidden_size": 896, "intermediate_size": 4736, "num_hidden_layers": 14, "num_attention_heads": 7,
         "num_key_value_heads": 1},
        {"hidden_size": 320, "intermediate_size": 860, "out_hidden_size": 896, "num_heads": 4},
        {},
    ),
}  # fmt: skip
# Qwen's vocabulary alone would be most of 300M parameters
QWEN_VOCABULARY = 32_064
QWEN_IDS = {"image_token_id": 32_000, "video_token_id": 32_001, "vision_start_token_id": 32_002,
            "vision_end_token_id": 32_003, "bos_token_id": 1, "eos_token_id": 2, "vision_token_id": 32_004}  # fmt: skip


def scaled_config(family: str) -> dict[str, Any]:
    """The ``config.json`` of a family at about 300M parameters."""
    name, text, vision, qformer = SCALED[family]
    fields = published(name)
    nested = "text_config" in fields
    if nested:
        fields["text_config"] = {**fields["text_config"], **text}
    else:
        fields |= {**text, "vocab_size": QWEN_VOCABULARY, **QWEN_IDS}
    fields["vision_config"] = {**fields["vision_config"], **vision}
    if qformer:
        fields["qformer_config"] = {**fields["qformer_config"], **qformer}
    if family == "llava_next":
        side = vision["image_size"]
        fields["image_grid_pinpoints"] = [[y * side // 336, x * side // 336] for y, x in fields["image_grid_pinpoints"]]
    return fields


def published(name: str) -> dict[str, Any]:
    """A published ``config.json``."""
    sys.path.insert(0, str(ROOT))
    from tests.support.checkpoints import published_config

    return published_config(name)


def shapes_of(fields: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint, as files on the hub name it, with its shape."""
    sys.path.insert(0, str(ROOT))
    from tests.support.spellings import hub_name

    given = json.loads(json.dumps(fields))
    kind: Any = getattr(transformers, given.pop("architectures")[0])
    family = given.pop("model_type")
    given.pop("torch_dtype", None)
    with torch.device("meta"):
        state = kind(AutoConfig.for_model(family, **given)).state_dict()
    tied = bool(fields.get("tie_word_embeddings"))
    return {
        hub_name(name, family): tuple(value.shape)
        for name, value in state.items()
        if not (tied and name.endswith("lm_head.weight"))
    }


def made_up(name: str, shape: tuple[int, ...], block: np.ndarray) -> np.ndarray:
    """The numbers of a tensor: products keep the size of what they multiply, norms are near one, all else is small."""
    size = math.prod(shape)
    start = zlib.crc32(name.encode()) % (len(block) // 2)
    noise = np.resize(block[start : start + min(size, len(block) // 2)], shape)
    if len(shape) == 1:
        return 1 + 0.2 * noise if "norm" in name.lower() or "ln_q" in name else 0.1 * noise
    if "embed" in name or "newline" in name or name.endswith(("query_tokens", "class_embedding")):
        return 0.5 * noise
    return noise * (1.0 / math.sqrt(math.prod(shape[1:])))


def write(folder: Path, fields: dict[str, Any], seed: int = 0) -> int:
    """Writes a checkpoint.

    Args:
      folder: does not exist yet.
      fields: its ``config.json``.
      seed: of the weights.

    Returns:
      The number of its parameters.
    """
    folder.mkdir(parents=True)
    block = np.random.default_rng(seed).standard_normal(BLOCK, dtype=np.float32)
    shapes = shapes_of(fields)
    shards: list[dict[str, np.ndarray]] = [{}]
    files: dict[str, int] = {}
    held = total = 0

    def flush() -> None:
        save_file(shards[-1], folder / f"shard-{len(shards)}.safetensors")
        shards[-1] = {}

    for name, shape in shapes.items():
        array = made_up(name, shape, block).astype(ml_dtypes.bfloat16)
        if shards[-1] and held + array.nbytes > SHARD:
            flush()
            shards.append({})
            held = 0
        shards[-1][name] = array
        files[name] = len(shards)
        held += array.nbytes
        total += array.size
    flush()
    many = len(shards)
    weight_map = {name: f"model-{number:05d}-of-{many:05d}.safetensors" for name, number in files.items()}
    for number in range(1, many + 1):
        (folder / f"shard-{number}.safetensors").rename(folder / f"model-{number:05d}-of-{many:05d}.safetensors")
    index = {"metadata": {"total_size": 2 * total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({**fields, "torch_dtype": "bfloat16"}, indent=2))
    return total


def main(
    name: Annotated[str, typer.Argument(help="A family, at about 300M; with --full a published config.")],
    folder: Annotated[Path, typer.Argument(help="New folder.")],
    full: Annotated[bool, typer.Option("--full", help="At real size.")] = False,
    layers: Annotated[int | None, typer.Option(min=1, help="Decoder layers, instead of the config's.")] = None,
) -> None:
    """Writes a checkpoint with made up weights."""
    fields = published(name) if full else scaled_config(name)
    if layers is not None:
        text = fields.get("text_config", fields)
        text["num_hidden_layers"] = layers
    log.print(f"{write(folder, fields):,} parameters in {folder}", highlight=False)


if __name__ == "__main__":
    typer.run(main)
