"""Writes the committed goldens: tiny checkpoints with what PyTorch computes on them.

    python scripts/make_goldens.py [NAME ...]

Each golden is a folder under tests/fixtures/goldens with a checkpoint as transformers saves it, and ``golden.npz``: the
inputs; for the clean model and each edit the logits, residual streams and attention weights; and the greedy tokens of
``generate``. With them parity can be tested where torch is not installed. Needs the test extra; run it again only when
a golden is added.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
GOLDENS = ROOT / "tests" / "fixtures" / "goldens"
SMALL_TEXT = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "max_position_embeddings": 64}
SMALL_VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "image_size": 14}
# LLaVA's, made smaller still; then one of every other family
SHRUNK = ("grouped_queries", "class_token_biases", "llama3_rope", "tied_linear_rope")
NAMES = (*SHRUNK, "next_llama", "vip_five_layers", "instructblip_cross_seldom", "qwen2_vl", "qwen2_5_vl")
NEW_TOKENS = 8


def main() -> None:
    """Writes the goldens named, or every one, anew."""
    sys.path.insert(0, str(ROOT))
    from tests.support import generation, reference, tiny

    wanted = sys.argv[1:] or NAMES
    unknown = set(wanted) - set(NAMES)
    if unknown:
        sys.exit(f"no goldens {', '.join(sorted(unknown))}; expected some of {', '.join(NAMES)}")
    for seed, name in enumerate(NAMES):
        if name not in wanted:
            continue
        folder = GOLDENS / name
        shutil.rmtree(folder, ignore_errors=True)
        fields = tiny.config_fields(name)
        fields["text_config"] |= SMALL_TEXT if name in SHRUNK else {"num_hidden_layers": 3}
        fields["vision_config"] |= SMALL_VISION if name in SHRUNK else {}
        model = tiny.make_torch(fields, seed)
        model.save_pretrained(folder)
        pair = tiny.Pair(name, folder, model, tiny.jaxmllm.load(folder))
        layout = tiny.LAYOUTS["several_images"] if name in SHRUNK else [[2, 3], [6]]
        inputs = tiny.make_inputs(pair, layout, "left", seed)
        arrays: dict[str, Any] = {f"inputs/{key}": value for key, value in inputs.items()}
        image, question, _ = tiny.roles(pair, inputs)
        edits = {
            "clean": [],
            "erase_1": [reference.erase([1], image)],
            "blind_1": [reference.blind([1], image)],
            "knockout_0_1": [reference.knockout([0, 1], question, image)],
        }
        for edit, hooks in edits.items():
            run = reference.run(pair, inputs, *hooks)
            arrays |= {
                f"{edit}/logits": run.logits,
                f"{edit}/resid_post": run.resid_post,
                f"{edit}/attn_probs": run.attention,
            }
        arrays["generated"] = generation.hugging_face(pair, inputs, NEW_TOKENS)
        np.savez_compressed(folder / "golden.npz", **arrays)
        (folder / "generation_config.json").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
