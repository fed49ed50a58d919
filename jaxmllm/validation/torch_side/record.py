"""PyTorch's side of a validation from the first prompt to the finished recording."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jaxmllm.convert.checkpoint import read_json, weight_files
from jaxmllm.memory import trim
from jaxmllm.models.registry import family_of
from jaxmllm.validation.components import sequence_rows
from jaxmllm.validation.edit_cases import edit_cases
from jaxmllm.validation.phases import COMPONENT_PHASES, Progress, Settings, versions
from jaxmllm.validation.preprocessing import record_preprocessing
from jaxmllm.validation.prompts import Prompts, make_prompts
from jaxmllm.validation.recording import Recorder, Recording
from jaxmllm.validation.tensors import checksums
from jaxmllm.validation.torch_side.answers import add_answer_floors, record_answers
from jaxmllm.validation.torch_side.edits import add_edit_floors, record_edits
from jaxmllm.validation.torch_side.forward import record_components
from jaxmllm.validation.torch_side.generation import add_generation_floors, record_generation
from jaxmllm.validation.torch_side.loading import Reference, load_reference
from jaxmllm.validation.torch_side.ways import type_of, ways_for

SMALL = 100 * 10**6  # bytes of weights


def record_checkpoint(folder: Path, destination: Path, settings: Settings, on_progress: Progress) -> Recording:
    """Records everything that the phases asked for compare.

    Args:
      folder: a Hugging Face folder.
      destination: a folder that does not exist yet; it appears whole or not at all.
      settings: see ``Settings``; ``streamed`` is decided.
      on_progress: told what is done next.

    Raises:
      InputError: the destination exists or cannot be written.
      JaxmllmError: as ``load`` does.
    """
    fields = read_json(folder / "config.json")
    config = family_of(fields).read_config(fields)
    prompts = make_prompts(folder, config, settings.seed, settings.images, settings.questions)
    valid = prompts.inputs["attention_mask"].astype(bool)
    rows = sequence_rows(valid, prompts.inputs["answer_positions"].ravel().tolist())
    recorder = Recorder(destination, prompts.inputs, settings.dtype, rows)
    try:
        with _threads(folder):
            header = _record(recorder, folder, fields, config, prompts, settings, on_progress)
        return recorder.finish(header)
    except BaseException:
        recorder.discard()
        raise
    finally:
        trim()  # the port is next


@contextlib.contextmanager
def _threads(folder: Path) -> Iterator[None]:
    """One thread for small models, whose products are over before several threads have met."""
    kept = torch.get_num_threads()
    if sum(path.stat().st_size for path in weight_files(folder)) < SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(kept)


def _record(
    recorder: Recorder,
    folder: Path,
    fields: dict[str, Any],
    config: Any,
    prompts: Prompts,
    settings: Settings,
    on_progress: Progress,
) -> dict[str, Any]:
    """Fills a recording; gives what goes into its header."""
    phases = set(settings.phases)
    header: dict[str, Any] = {
        "model": folder.name,
        "model_type": fields["model_type"],
        "config": fields,
        "image_token_id": config.image_token_id,
        "seed": settings.seed,
        "streamed": bool(settings.streamed),
        "prompts": prompts.to_json(),
        "versions": versions("torch"),
    }
    if "tensors" in phases:
        header["tensors"] = checksums(folder, settings.dtype, _told("PyTorch: checksums of tensors", on_progress))
    if "preprocessing" in phases:
        on_progress("PyTorch: preprocessing")
        header |= record_preprocessing(recorder, folder, prompts)
    ways = ways_for(settings.dtype, settings.accelerators)
    on_progress("PyTorch: loading")
    reference = load_reference(folder, settings.dtype, bool(settings.streamed))
    if phases & set(COMPONENT_PHASES):
        record_components(recorder, reference, folder, ways, _told("PyTorch: components", on_progress))
    header |= _record_behaviour(recorder, reference, prompts, settings, on_progress)
    return header


def _record_behaviour(
    recorder: Recorder, reference: Reference, prompts: Prompts, settings: Settings, on_progress: Progress
) -> dict[str, Any]:
    """Answers, contrast, generation and edits, with their floors in the wider type.

    Each is a pass over all weights, or several; where they are streamed the port does not run them either.
    """
    phases = set(settings.phases)
    header: dict[str, Any] = {}
    if settings.streamed or not phases & {"answer", "contrast", "generation", "edits"}:
        return header
    wide = ways_for(settings.dtype, False)[0]
    wider = load_reference(reference.folder, type_of(wide, settings.dtype), streamed=True, rounded_to=settings.dtype)
    if phases & {"answer", "contrast"}:
        on_progress("PyTorch: answers")
        header |= record_answers(recorder, reference)
        add_answer_floors(recorder, wider, wide, header)
    if "generation" in phases:
        on_progress("PyTorch: generation")
        said = record_generation(recorder, reference, prompts.generation, settings.new_tokens)
        header |= said
        tokens = np.asarray(said["generation"]["tokens"])
        add_generation_floors(recorder, wider, wide, prompts.generation, tokens)
    if "edits" in phases:
        cases = edit_cases(len(reference.anatomy.layers))
        for number, case in enumerate(cases):
            on_progress(f"PyTorch: edits, {number + 1} of {len(cases)}")
            record_edits(recorder, reference, [case])
            add_edit_floors(recorder, wider, wide, [case])
            recorder.flush()
    return header


def _told(what: str, on_progress: Progress) -> Callable[[int, int], None]:
    return lambda done, total: on_progress(f"{what}, {done} of {total}")
