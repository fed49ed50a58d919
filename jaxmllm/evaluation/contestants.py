"""Who takes part in a contest of methods, and what was tuned before it: a TOML file.

    fusion_layers = [0, 1]              # for the methods that use them

    [main]                              # a group, which is a table of the report
    base = "base"                       # label = method, as ``jaxmllm.methods.parse_method`` reads it
    "vicrop grad-att" = "vicrop:map=grad-att"

    [tuning]
    split = "validation"                # where, on how many questions of which seed
    questions = 240
    seed = 0
    rule = "the most right answers"

    [tuning.tried]                      # label = which values of which options
    "vicrop grad-att" = "layer: 2, 3, 4"

The first contestant is what the others are held against.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxmllm.errors import InputError
from jaxmllm.methods import Method, parse_method, spell


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A method that takes part.

    Attributes:
      label: what tables call it.
      group: which table it is in.
      method: how it answers.
    """

    label: str
    group: str
    method: Method

    @property
    def spec(self) -> str:
        """The method in words, with all options that differ from their defaults."""
        return spell(self.method)


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What was chosen before the contest, on other questions.

    Attributes:
      split, questions, seed: on which.
      rule: by which the best was chosen.
      tried: label of a contestant -> the values that were tried; what is not here was left at its defaults.
    """

    split: str = "validation"
    questions: int = 0
    seed: int = 0
    rule: str = ""
    tried: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Lineup:
    """A file's contestants in its order, what was tuned, and the model's fusion layers where it names them."""

    contestants: tuple[Contestant, ...]
    tuning: Tuning
    fusion_layers: tuple[int, ...] | None = None

    def tuning_lines(self) -> list[str]:
        """What was tuned, over which values, and what was chosen, in words."""
        tuning = self.tuning
        if not tuning.tried:
            return ["Nothing was tuned: all options are at the values of the file."]
        where = f"{tuning.questions} questions of the {tuning.split} split, seed {tuning.seed}"
        chosen = {contestant.label: contestant.spec for contestant in self.contestants}
        return [
            f"Tuned on {where}: {tuning.rule}.",
            *(f"{label}: tried {tried}; chosen {chosen[label]}" for label, tried in tuning.tried.items()),
        ]


def read_lineup(path: str | Path) -> Lineup:
    """Reads the file of a contest.

    Raises:
      InputError: it cannot be read, names a method or option that there is not, uses a label twice, or tells of the
        tuning of a contestant that is not in it.
    """
    path = Path(path)
    try:
        fields = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    fusion_layers = fields.pop("fusion_layers", None)
    tuning = _tuning(path, fields.pop("tuning", {}))
    loose = [name for name, group in fields.items() if not isinstance(group, dict)]
    if loose:
        raise InputError(f"{path}: {loose[0]} is no table; expected fusion_layers, [tuning], and groups of methods")
    contestants: list[Contestant] = []
    for group, specs in fields.items():
        for label, spec in specs.items():
            if label in [one.label for one in contestants]:
                raise InputError(f"{path}: {label!r} is there twice; give each contestant a label of its own")
            if not isinstance(spec, str):
                raise InputError(f"{path}: {label!r} is {spec!r}; expected a method in words")
            contestants.append(Contestant(label, group, parse_method(spec, fusion_layers)))
    if not contestants:
        raise InputError(f"{path}: holds no methods")
    unknown = set(tuning.tried) - {one.label for one in contestants}
    if unknown:
        raise InputError(f"{path}: [tuning.tried] tells of {', '.join(sorted(unknown))}, which no group has")
    return Lineup(tuple(contestants), tuning, None if fusion_layers is None else tuple(fusion_layers))


def _tuning(path: Path, fields: Mapping[str, Any]) -> Tuning:
    try:
        return Tuning(**fields)
    except TypeError as error:
        raise InputError(f"{path}: [tuning] cannot be read ({error})") from error
