"""The components of the port one after another: each from the reference's input, and all from the prompts on."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from jaxmllm.errors import JaxmllmError
from jaxmllm.models.inputs import Inputs
from jaxmllm.validation.components import split
from jaxmllm.validation.gather import Gathered, told
from jaxmllm.validation.port import decoder, images
from jaxmllm.validation.port.behaviour import of_model
from jaxmllm.validation.port.model import Port

Progress = Callable[[str], None]


def layers_of(gathered: Gathered, part: str) -> list[int]:
    """The recorded layers of a part."""
    found = {split(name)[1] for name in gathered.recording.names() if split(name)[0] == part}
    return sorted(number for number in found if number is not None)


def walk(port: Port, gathered: Gathered, phases: Iterable[str], on_progress: Progress = lambda what: None) -> None:
    """Compares all components of the phases asked for.

    Args:
      port: the port.
      gathered: takes the comparisons.
      phases: some of ``vision``, ``connector``, ``embedding``, ``decoder`` and ``logits``.
      on_progress: told what is compared next.
    """
    arrays = dict(gathered.inputs)
    wanted = set(phases)
    try:
        inputs = port.inputs(of_model(arrays))
    except JaxmllmError as error:  # of what PyTorch took
        gathered.broken |= {phase: [f"the port refuses the inputs: {told(error)}"] for phase in wanted}
        return
    if inputs.images is not None and wanted & {"vision", "connector"}:
        on_progress("vision tower and connector")
        _images(port, gathered, inputs, arrays)
    if wanted & {"embedding", "decoder", "logits"}:
        on_progress("embedding")
        _embedding(port, gathered, inputs)
        _own_layers(port, gathered, inputs, on_progress)
        _own_head(port, gathered)
        on_progress("production run")
        _run(port, gathered, inputs, arrays)


def _images(port: Port, gathered: Gathered, inputs: Inputs, arrays: dict[str, np.ndarray]) -> None:
    read = gathered.recording.read
    embedded = features = None
    with gathered.attempt("vision"):
        embedded = images.vision_embed(port, inputs, arrays)
        gathered.note("vision.embed", "own", embedded)
        gathered.note("vision.embed", "run", embedded)
    with gathered.attempt("vision"):
        blocks = images.Blocks(port, inputs, arrays)
        numbers = layers_of(gathered, "vision")
        if blocks.depth < len(numbers):
            raise ValueError(f"the port has {blocks.depth} vision blocks, the reference reads {len(numbers)}")
        for number in numbers:
            for site, value in blocks.sites(number, read(f"vision.{number}.resid_pre")).items():
                gathered.note(f"vision.{number}.{site}", "own", value)
        if embedded is not None:
            for number, sites in zip(numbers, images.chain(blocks, embedded), strict=False):
                for site, value in sites.items():
                    gathered.note(f"vision.{number}.{site}", "run", value)
                features = sites["resid_post"]  # what Qwen's merger reads
    with gathered.attempt("vision"):
        produced = images.vision_features(port, inputs, arrays)
        if produced is not None:
            features = produced
            gathered.note("vision.features", "run", features)
    if "qformer.embed" in gathered.recording:
        with gathered.attempt("connector"):
            _qformer(port, gathered, inputs, features)
    with gathered.attempt("connector"):
        asking = layers_of(gathered, "qformer")
        if asking:
            own = images.projected(port, read(f"qformer.{asking[-1]}.resid_post"))
        else:
            last = f"vision.{layers_of(gathered, 'vision')[-1]}.resid_post"
            given = read("vision.features" if "vision.features" in gathered.recording else last)
            own = images.connector(port, inputs, arrays, given)
        gathered.note("connector", "own", own)
    if features is not None:
        with gathered.attempt("connector"):
            gathered.note("connector", "run", images.connector(port, inputs, arrays, features))
    with gathered.attempt("connector"):
        gathered.note("image_tokens", "own", images.arranged(port, inputs, arrays, read("connector")))
    with gathered.attempt("connector"):
        gathered.note("image_tokens", "run", images.image_tokens(port, inputs))


def _qformer(port: Port, gathered: Gathered, inputs: Inputs, features: np.ndarray | None) -> None:
    read = gathered.recording.read
    embedded = images.qformer_embed(port, inputs)
    gathered.note("qformer.embed", "own", embedded)
    gathered.note("qformer.embed", "run", embedded)
    source, hidden = read("vision.features"), embedded
    for number in layers_of(gathered, "qformer"):
        given = read(f"qformer.{number}.resid_pre")
        for site, value in images.qformer_sites(port, inputs, number, given, source).items():
            gathered.note(f"qformer.{number}.{site}", "own", value)
        if features is not None:
            sites = images.qformer_sites(port, inputs, number, hidden, features)
            for site, value in sites.items():
                gathered.note(f"qformer.{number}.{site}", "run", value)
            hidden = sites["resid_post"]


def _embedding(port: Port, gathered: Gathered, inputs: Inputs) -> None:
    with gathered.attempt("embedding"):
        gathered.note("positions", "own", decoder.positions(port, inputs))
    with gathered.attempt("embedding"):
        gathered.note("rotary", "own", decoder.rotary(port, inputs))
    with gathered.attempt("embedding"):
        tokens = None
        if inputs.images is not None:
            tokens = images.padded_tokens(inputs, gathered.recording.read("image_tokens"))
        gathered.note("embedding", "own", decoder.embedding(port, inputs, tokens))


def _own_layers(port: Port, gathered: Gathered, inputs: Inputs, on_progress: Progress) -> None:
    rows = gathered.recording.rows("final_norm")
    for number in range(port.num_layers):
        on_progress(f"decoder layer {number + 1} of {port.num_layers}")
        with gathered.attempt("decoder"):
            given = gathered.recording.read(f"decoder.{number}.resid_pre")
            for site, value in decoder.layer_sites(port, number, given, inputs, rows).items():
                if site != "resid_pre":
                    gathered.note(f"decoder.{number}.{site}", "own", value)


def _own_head(port: Port, gathered: Gathered) -> None:
    read = gathered.recording.read
    with gathered.attempt("logits"):
        gathered.note("final_norm", "own", decoder.final_norm(port, read(f"decoder.{port.num_layers - 1}.resid_post")))
    with gathered.attempt("logits"):
        gathered.note("logits", "own", decoder.logits(port, read("final_norm")))


def _run(port: Port, gathered: Gathered, inputs: Inputs, arrays: dict[str, np.ndarray]) -> None:
    rows = gathered.recording.rows("final_norm")
    last = None
    with gathered.attempt("decoder"):
        if port.model is not None:
            sites, logits = decoder.production_run(port, of_model(arrays), rows)
            gathered.note("embedding", "run", sites["resid_pre"][0])
            for number in range(port.num_layers):
                for site, value in sites.items():
                    gathered.note(f"decoder.{number}.{site}", "run", value[number])
            last = sites["resid_post"][-1]
            gathered.note("final_norm", "run", decoder.final_norm(port, last))
            gathered.note("logits", "run", logits)
            return
        tokens = None if inputs.images is None else images.padded_tokens(inputs, images.image_tokens(port, inputs))
        embedded = decoder.embedding(port, inputs, tokens)
        gathered.note("embedding", "run", embedded)
        for number, sites in enumerate(decoder.chained_run(port, embedded, inputs, rows)):
            for site, value in sites.items():
                gathered.note(f"decoder.{number}.{site}", "run", value)
            last = sites["resid_post"]
    if last is not None:
        with gathered.attempt("logits"):
            normed = decoder.final_norm(port, last)
            gathered.note("final_norm", "run", normed)
            gathered.note("logits", "run", decoder.logits(port, normed))
