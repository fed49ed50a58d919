"""Validation of a checkpoint: PyTorch's side is recorded, the port is compared with the recording."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import resource
import sys
import tempfile
from pathlib import Path

from jaxmllm.convert import checkpoint, store
from jaxmllm.errors import InputError
from jaxmllm.memory import gigabytes
from jaxmllm.model import Model, find_checkpoint
from jaxmllm.validation.compare import compare
from jaxmllm.validation.phases import Progress, Settings, versions
from jaxmllm.validation.port.model import from_folder, from_model
from jaxmllm.validation.recording import Recording
from jaxmllm.validation.report import Report

# Bytes of memory a parameter, at most: a copy in float32, and as much again while it is loaded or laid out anew.
BYTES_A_PARAMETER = 8
SHARE_OF_MEMORY = 0.7


def validate(
    model: str | Path | Model,
    *,
    reference: str | Path | None = None,
    against: str | Path | None = None,
    settings: Settings = Settings(),
    command: str = "",
    on_progress: Progress = lambda what: None,
) -> Report:
    """Compares the port of a checkpoint with PyTorch, component by component.

    Args:
      model: a checkpoint folder, an Orbax store, a name on the hub, or a loaded model.
      reference: a recording of PyTorch's side (``record``), which then is not run here; without it, torch is needed.
      against: the Hugging Face folder that PyTorch loads; by default the model's own.
      settings: see there.
      command: what the report says it was made by.
      on_progress: told what is done next.

    Raises:
      InputError: settings that do not exist, a recording of another model, no torch where it is needed.
      JaxmllmError: as ``load`` does.
    """
    settings.check()
    folder = model.folder if isinstance(model, Model) else find_checkpoint(model)
    if reference is not None:
        return _compared(model, Recording(Path(reference)), settings, command, on_progress)
    with tempfile.TemporaryDirectory(prefix="jaxmllm-validate-") as scratch:
        recorded = record(against or folder, Path(scratch) / "recording", settings=settings, on_progress=on_progress)
        return _compared(model, recorded, settings, command, on_progress)


def record(
    folder: str | Path,
    destination: Path,
    *,
    settings: Settings = Settings(),
    on_progress: Progress = lambda what: None,
) -> Recording:
    """Runs PyTorch's side and writes what it gives, for comparisons here or elsewhere.

    Args:
      folder: a Hugging Face folder, or a name on the hub.
      destination: a folder that does not exist yet; it appears whole or not at all.
      settings: see there.
      on_progress: told what is done next.

    Raises:
      InputError: no torch, a store instead of a Hugging Face folder, a destination that exists or cannot be written.
      JaxmllmError: as ``load`` does.
    """
    settings.check()
    source = find_checkpoint(folder)
    if store.is_store(source):
        raise InputError(
            f"{source}: is an Orbax store, which PyTorch does not read; name the Hugging Face folder that it was made "
            "from with --against, or a recording with --reference"
        )
    if importlib.util.find_spec("torch") is None:
        raise InputError(
            "PyTorch is not installed, and it is the reference: pip install 'jaxmllm[validate]', or compare with a "
            "recording made where it is (--reference)"
        )
    from jaxmllm.validation.torch_side.record import record_checkpoint

    streamed = must_stream(source) if settings.streamed is None else settings.streamed
    return record_checkpoint(source, destination, dataclasses.replace(settings, streamed=streamed), on_progress)


def must_stream(folder: Path) -> bool:
    """Whether PyTorch's side of a checkpoint would take too much of this machine's memory."""
    headers = checkpoint.read_headers(checkpoint.weight_files(folder))
    parameters = sum(math.prod(header.shape) for header in headers.values())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return parameters * BYTES_A_PARAMETER > SHARE_OF_MEMORY * memory


def _compared(
    model: str | Path | Model, recording: Recording, settings: Settings, command: str, on_progress: Progress
) -> Report:
    if isinstance(model, Model):
        port = from_model(model)
    else:
        on_progress("loading the port")
        streamed = settings.streamed
        port = from_folder(model, settings.dtype, bool(recording.header["streamed"]) if streamed is None else streamed)
    said = {
        "dtype": recording.dtype,
        "streamed": port.model is None,
        "prompts": int(recording.inputs()["input_ids"].shape[0]),
        "positions": int(recording.inputs()["input_ids"].shape[1]),
        "seed": recording.header.get("seed"),
    }
    theirs = {f"{name} (reference)": version for name, version in recording.header["versions"].items()}
    report = compare(
        port,
        recording,
        phases=settings.phases,
        precision=settings.precision,
        settings=said,
        versions=versions() | theirs,
        command=command,
        on_progress=on_progress,
    )
    return dataclasses.replace(report, settings={**report.settings, "peak_memory": gigabytes(peak_memory())})


def peak_memory() -> int:
    """Bytes that this process has held resident at most, pages of mapped files among them."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
