"""Run by ``test_meshes.py`` with eight devices: the embedded model on one mesh after another, against one device."""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import numpy as np

import jaxmllm
from jaxmllm.data.questions import read_questions
from jaxmllm.model import Model, load
from jaxmllm.models.sharding import param_shardings
from jaxmllm.parallel.mesh import arrange

DEMO = Path(jaxmllm.__file__).parent / "demo"


def results(model: Model, questions: list) -> dict[str, np.ndarray]:
    """Numbers of every kind of computation."""
    images, texts = [one.image for one in questions], [one.text for one in questions]
    inputs = model.prepare(images, texts)
    out = model.forward(model.params, inputs, capture=jaxmllm.Capture.attention(), logits_at="last")
    answers = jaxmllm.generate(model, inputs, max_new_tokens=4)
    found = jaxmllm.sweep(model, inputs, [one.answer for one in questions], edits="erase", batch_size=4)
    knocked = jaxmllm.sweep(model, inputs, [one.answer for one in questions], edits="knockout", batch_size=4)
    return {
        "logits": np.asarray(out.logits),
        "attention": np.asarray(out.captured["attn_probs"]),
        "tokens": answers.tokens,
        "log_probabilities": answers.log_probabilities,
        "erased": found.edited.log_probability,
        "knocked": knocked.edited.log_probability,
        "early": found.early.log_probability,
        "swept_attention": found.attention,
    }


def main() -> None:
    questions = list(read_questions(DEMO / "questions" / "questions.jsonl", DEMO / "questions" / "images")[:16])
    alone = load(DEMO / "model")
    expected = results(alone, questions)
    for text in sys.argv[1:]:
        data, model = map(int, text.split("x"))
        mesh = arrange({"data": data, "model": model}, jax.devices()[: data * model])
        ours = load(DEMO / "model", mesh=mesh)
        wanted = param_shardings(ours.params, ours.config, mesh)
        laid = jax.tree.map(lambda leaf, sharding: leaf.sharding == sharding, ours.params, wanted)
        assert all(jax.tree.leaves(laid)), laid
        found, again = results(ours, questions), results(dataclasses.replace(ours), questions)
        inputs = ours.prepare([one.image for one in questions], [one.text for one in questions])
        whole = ours.forward(ours.params, inputs, capture=jaxmllm.Capture.residual())
        print(
            json.dumps(
                {
                    "mesh": text,
                    "tokens": bool((found["tokens"] == expected["tokens"]).all()),
                    "largest": {name: float(np.abs(found[name] - expected[name]).max()) for name in expected},
                    "repeats": all(found[name].tobytes() == again[name].tobytes() for name in found),
                    "logits": list(whole.logits.sharding.spec),
                    "residual": list(whole.captured["resid_post"].sharding.spec),
                    "query": list(ours.params["decoder"]["layers"]["attention"]["query"]["kernel"].sharding.spec),
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
