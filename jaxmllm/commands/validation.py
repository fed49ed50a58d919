"""``jaxmllm validate``: the port against PyTorch, as reports."""

from __future__ import annotations

import dataclasses
import shlex
import sys
import time
import traceback
from pathlib import Path

from rich.console import Console

from jaxmllm.errors import InputError, JaxmllmError
from jaxmllm.files import write_json, write_text
from jaxmllm.report.validation import console as on_console
from jaxmllm.report.validation import html, markdown, tensorboard
from jaxmllm.validation.phases import Settings
from jaxmllm.validation.run import record, validate

COULD_NOT_RUN = 2
WIDEST = 100  # characters of the widest table


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked of ``jaxmllm validate``; see its options."""

    model: str
    save: Path | None
    reference: Path | None
    against: str | None
    logdir: Path | None


def validate_and_report(request: Request, settings: Settings) -> int:
    """Validates a checkpoint, or records PyTorch's side of it, and says what came out.

    Returns:
      The exit code: 0 passes, 1 differs, 2 could not run.

    Raises:
      JaxmllmError: as ``validate`` and ``record``.
    """
    console = Console()
    if console.width < WIDEST:  # a narrow terminal, or none, would cut columns off; lines wrap instead
        console = Console(width=WIDEST)
    if request.save is not None and (request.reference is not None or request.logdir is not None):
        raise InputError("--save only records PyTorch's side; leave out --reference and --logdir")
    if request.reference is not None and request.against is not None:
        raise InputError("--reference and --against both name what to compare with; give one of them")
    if request.logdir is not None and request.logdir.exists() and not request.logdir.is_dir():
        raise InputError(f"{request.logdir}: is not a folder; name another one for the reports with --logdir")
    try:
        with console.status("starting") as status:
            if request.save is not None:
                record(request.against or request.model, request.save, settings=settings, on_progress=status.update)
            else:
                report = validate(
                    request.model,
                    reference=request.reference,
                    against=request.against,
                    settings=settings,
                    command=shlex.join(["jaxmllm", *sys.argv[1:]]),
                    on_progress=status.update,
                )
    except JaxmllmError:
        raise
    except Exception:
        # an exit code of 1 would say that the port differs
        traceback.print_exc()
        return COULD_NOT_RUN
    if request.save is not None:
        console.print(
            f"recorded in {request.save}; compare with `jaxmllm validate MODEL --reference {request.save}`",
            highlight=False,
            soft_wrap=True,
        )
        return 0
    name = Path(request.model).name
    logdir = request.logdir or Path("runs") / time.strftime(f"validate-{name}-%Y%m%d-%H%M%S")
    try:
        logdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # which must not end in the exit code of a port that differs
        raise InputError(f"{logdir}: cannot be made ({error.strerror}); name another folder with --logdir") from error
    write_json(logdir / "report.json", report.to_json())
    write_text(logdir / "report.html", html.page(report))
    write_text(logdir / "report.md", markdown.page(report))
    tensorboard.write(report, logdir, report.samples)
    console.print(on_console.summary(report))
    console.print(
        f"reports in {logdir}: report.html, report.md, report.json, TensorBoard", soft_wrap=True, highlight=False
    )
    return report.exit_code
