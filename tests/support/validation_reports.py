"""Made-up reports of validations, with the names, numbers and shapes of real ones."""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxmllm.validation.components import BLOCK_SITES, DECODER_SITES, QFORMER_SITES, phase_of, split
from jaxmllm.validation.distributions import Errors
from jaxmllm.validation.report import Cause, Comparison, Floor, Phase, Report

PHASES = (
    "tensors",
    "preprocessing",
    "vision",
    "connector",
    "embedding",
    "decoder",
    "logits",
    "answer",
    "generation",
    "edits",
    "contrast",
)
WAYS = ("float64", "other order", "tf32 products")
SWAPPED = Cause(
    name="gate and up projections are swapped",
    evidence="with gate and up exchanged, mlp_out of layer 5 is 2.1e-06 from the reference (was 3.1e-01)",
    explained=0.998,
    where="decoder/layers/mlp/{gate,up}, jaxmllm/convert/tables.py",
)
OTHERS = (
    Cause(
        "activation: silu where the reference has gelu",
        "with gelu, 41% of the difference goes away",
        0.41,
        "hidden_act",
    ),
    Cause("bias of the down projection is missing", where="decoder/layers/mlp/down/bias"),
)


def names(blocks: int = 24, layers: int = 32, qformer: int = 0) -> list[str]:
    """Components of a model, in the order of computation."""
    found = ["vision.embed", *(f"vision.{block}.{site}" for block in range(blocks) for site in BLOCK_SITES)]
    found.append("vision.features")
    if qformer:
        found.append("qformer.embed")
        for layer in range(qformer):
            found += [f"qformer.{layer}.{site}" for site in QFORMER_SITES if site != "cross_out" or layer % 2 == 0]
    found += ["connector", "image_tokens", "positions", "rotary", "embedding"]
    found += [f"decoder.{layer}.{site}" for layer in range(layers) for site in DECODER_SITES]
    return [*found, "final_norm", "logits"]


def make_errors(size: float, scale: float = 1.0, spread: float = 6.0) -> Errors:
    """Differences of about a size."""
    ulp = scale * 2.0**-23
    return Errors(
        count=12288,
        scale=scale,
        mean=size,
        p99=spread * size / 2,
        max=spread * size,
        ulp_mean=size / ulp,
        ulp_p99=spread * size / 2 / ulp,
        ulp_max=spread * size / ulp,
        cosine=1 - min(1.0, (size / scale) ** 2),
        worst=(0, 17, 1044),
    )


def make_comparison(component: str, kind: str = "own", ratio: float = 0.4, size: float = 1e-6) -> Comparison:
    """A comparison whose floor is of a size, and whose error is the ratio times what is allowed of it."""
    floor = Floor({way: make_errors(size * share) for way, share in zip(WAYS, (1.0, 0.7, 0.9), strict=True)})
    return Comparison(component, kind, make_errors(3 * size * ratio), floor, ratio, "prompt 0, token 17 (' plane')")


def make_report(
    first: str | None = None,
    causes: tuple[Cause, ...] = (SWAPPED, *OTHERS),
    blocks: int = 24,
    layers: int = 32,
    qformer: int = 0,
    model: str = "llava-hf/llava-1.5-7b-hf",
) -> Report:
    """A report that passes, or one in which a component departs first and all that follows departs in the run.

    Args:
      first: the component; with a layer, its site departs in all later layers of its part as well, in ``own``.
      causes: of the departure.
      blocks, layers, qformer: depths.
      model: its name.
    """
    random = np.random.default_rng(0)
    order = names(blocks, layers, qformer)
    part, layer, site = split(first) if first else ("", None, "")
    found: dict[str, list[Comparison]] = {phase: [] for phase in PHASES}
    for place, name in enumerate(order):
        depth = 1 + place / 40
        its_part, its_layer, its_site = split(name)
        own = float(random.lognormal(-1.2, 0.35))
        run = float(random.lognormal(-1.0, 0.3))
        if first and (
            name == first or (layer is not None and (its_part, its_site) == (part, site) and its_layer > layer)
        ):
            own = float(random.lognormal(5.5, 0.5))
        if first and place >= order.index(first):
            run = float(random.lognormal(7.0, 0.3))
        if name == "positions":
            own = run = 0.0
        if its_site not in ("resid_pre", "attn_in~faint", "mlp_in~faint"):
            found[phase_of(name)].append(make_comparison(name, "run", min(run, 1e4), 4e-7 * depth))
        found[phase_of(name)].append(make_comparison(name, "own", min(own, 1e4), 3e-7))
    agreement = {"rows": 512.0, "top1": 0.998, "undecided": 0.002, "kl_mean": 3.1e-9, "kl_max": 2.2e-7}
    found["logits"] = [
        dataclasses.replace(each, details=agreement if each.component == "logits" and each.kind == "run" else {})
        for each in found["logits"]
    ]
    return Report(
        model=model,
        reference="transformers 5.10.1, eager attention, torch 2.13.0 on cpu",
        settings={
            "dtype": "float32",
            "precision": "highest",
            "device": "cpu",
            "prompts": 3,
            "rows": "all",
            "ways": ["float64", "other order"],
        },
        versions={"jaxmllm": "0.1.0", "jax": "0.10.2", "torch": "2.13.0", "transformers": "5.10.1"},
        command=f"jaxmllm validate {model} --dtype float32 --save recordings/llava",
        phases=tuple(_phase(name, tuple(found[name]), first, causes) for name in PHASES),
        first=first,
        samples={f"own/{name}": random.lognormal(-14, 1, 64) for name in order if name != "positions"},
    )


def _phase(name: str, found: tuple[Comparison, ...], first: str | None, causes: tuple[Cause, ...]) -> Phase:
    departing = sum(each.departs for each in found)
    differs = departing or (first is not None and name in ("answer", "generation"))
    summary = f"{departing} of {len(found)} comparisons depart" if found else "as the reference"
    findings = ("prompt 0: the reference says 'a plane', the port 'the the'",) if differs and not found else ()
    here = causes if first and phase_of(first) == name else ()
    seconds = 0.1 + 0.01 * len(found)
    if name == "contrast":
        return Phase(name, "skipped", "the sweep was not asked for", seconds=0.0)
    return Phase(name, "differs" if differs else "passes", summary, found, findings, here, seconds)
