"""Tunes the methods of `jaxmllm demo --methods` on the validation split: no scene and no digit of the test is in it.

    python scripts/tune_demo_methods.py                                    # all methods, some 130 settings
    python scripts/tune_demo_methods.py --only "vicrop rel-att" --questions 480

Prints the best settings of every method, and the lines for jaxmllm/demo/methods.toml: the choice, and what was tried.
The choice is the setting with the most right answers, of equals the first in the order of the values, which begin with
the defaults.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import jaxmllm
from jaxmllm.commands.study import progress
from jaxmllm.data.small_scenes import small_scene_questions
from jaxmllm.evaluation.contest import Result, run_contest
from jaxmllm.evaluation.contestants import Contestant, read_lineup
from jaxmllm.methods import Method, parse_method
from jaxmllm.report.contest import main_table
from jaxmllm.report.tables import percent

DEMO = Path(jaxmllm.__file__).parent / "demo"
SHOWN = 5  # settings of a method that are printed

Values = Mapping[str, Sequence[str]]
GENERAL = "how many objects are there ?"
SHARES: Values = {"share": ("0.35", "0.25", "0.5")}
# Thresholds and margins mean nothing to a window.
REGIONS: tuple[Values, ...] = (
    {"region": ("connected", "patches"), "threshold": ("0.5", "0.3"), "margin": ("0.5", "1"),
     "smallest": ("0.25", "0.35")},
    {"region": ("window",), "smallest": ("0.25", "0.35", "0.5")},
)  # fmt: skip
WINDOWS: Values = {"layer": ("4", "1", "2", "3"), "base": ("84", "118")}

# Label of a contestant -> what is fixed, and grids of what is tried.
GRIDS: dict[str, tuple[str, tuple[Values, ...]]] = {
    "random crop": ("random-crop:", (SHARES,)),
    "centre crop": ("centre-crop:", (SHARES,)),
    "evidence crop": ("evidence-crop:", (SHARES,)),
    "contrastive paper": ("contrastive:preset=paper", REGIONS),
    "contrastive layer0": ("contrastive:preset=layer0", REGIONS),
    "contrastive mean": ("contrastive:preset=mean", REGIONS),
    "review mask": (
        "review-mask:",
        (
            {
                "preset": ("paper", "layer0", "mean"), "layer": ("7", "2", "4"), "strength": ("0.5", "1"),
                "again": ("last", "question"),
            },
        ),
    ),
    "vicrop rel-att": (f"vicrop:map=rel-att,general={GENERAL}", (WINDOWS,)),
    "vicrop grad-att": ("vicrop:map=grad-att", (WINDOWS,)),
    "vicrop pure-grad": (f"vicrop:map=pure-grad,general={GENERAL}", ({"base": ("84", "118")},)),
    "carve": (
        f"carve:general={GENERAL},steps=16",
        ({"layers": ("5+6+7", "0+1", "1+2+3", "0+1+2+3+4+5+6+7"), "top": ("0.2", "0.1")},),
    ),
    "vcd": ("vcd:", ({"alpha": ("0.5", "1"), "step": ("500", "300")},)),
    "dola": ("dola:", ({"layers": ("low", "high"), "norm": ("false", "true"), "repetition_penalty": ("1.2", "1")},)),
}  # fmt: skip


def settings_of(label: str) -> Iterator[str]:
    """All settings of a contestant in words."""
    fixed, grids = GRIDS[label]
    for grid in grids:
        for values in itertools.product(*grid.values()):
            chosen = ",".join(f"{name}={value}" for name, value in zip(grid, values, strict=True))
            yield fixed + ("" if fixed.endswith(":") else ",") + chosen


def tried(label: str) -> str:
    """The values that are tried of a contestant, in words."""
    grids = ("; ".join(f"{name}: {', '.join(values)}" for name, values in grid.items()) for grid in GRIDS[label][1])
    return " | ".join(grids)


def tune(
    questions: Annotated[int, typer.Option(min=1, help="Questions of the validation split.")] = 240,
    seed: Annotated[int, typer.Option(min=0, help="Of its scenes.")] = 0,
    only: Annotated[list[str] | None, typer.Option(help="Labels of the methods to tune; by default all.")] = None,
    model: Annotated[Path, typer.Option(help="Folder of the model.")] = DEMO / "model",
) -> None:
    """Tries all settings and prints the best of each method."""
    console = Console()
    labels = only or list(GRIDS)
    unknown = set(labels) - set(GRIDS)
    if unknown:
        raise typer.BadParameter(f"no grid for {', '.join(sorted(unknown))}; there are {', '.join(GRIDS)}")
    fusion_layers = read_lineup(DEMO / "methods.toml").fusion_layers
    contestants = [Contestant("base", "base", Method())]
    contestants += [
        Contestant(spec, label, parse_method(spec, fusion_layers)) for label in labels for spec in settings_of(label)
    ]
    loaded, asked = jaxmllm.load(model), small_scene_questions("validation", questions, seed)
    with progress(console) as bars:
        task = bars.add_task(f"{len(contestants)} settings", total=None)
        contest = run_contest(
            loaded,
            asked,
            contestants,
            on_progress=lambda done, total, label: bars.update(task, completed=done, total=total),
        )
    base = contest.results[0]
    console.print(f"base: {percent(base.accuracy.value)}% of {questions} validation questions, seed {seed}")
    chosen: dict[str, Result] = {}
    for label in labels:
        found = [result for result in contest.results if result.contestant.group == label]
        ranked = sorted(found, key=lambda result: -result.accuracy.value)  # stable: of equals the first
        chosen[label] = ranked[0]
        print_ranked(console, label, ranked[:SHOWN], len(ranked))
    console.print("\nFor methods.toml:\n")
    for label, result in chosen.items():
        say(console, f"{json.dumps(label)} = {json.dumps(result.contestant.label)}")
    say(console, f"\n[tuning]\nquestions = {questions}\nseed = {seed}\n\n[tuning.tried]")
    for label in labels:
        say(console, f"{json.dumps(label)} = {json.dumps(tried(label))}")


def print_ranked(console: Console, label: str, ranked: Sequence[Result], count: int) -> None:
    """The best settings of one method."""
    rows = main_table(ranked)
    shown = [[row[1], row[2], row[3], row[0]] for row in rows]
    shown[0][3] = "setting"
    console.print(f"\n{label}: the best of {count} settings", highlight=False)
    for row in shown:
        say(console, f"{row[0]:>10}  {row[1]:>6}  {row[2]:>16}  {row[3]}")


def say(console: Console, text: str) -> None:
    """Prints text as it is."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    typer.run(tune)
