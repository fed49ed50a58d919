"""What a method of answering is: a small frozen object that says what it captures, what it shows or changes in a second
pass, and how it decodes. Everything it does not say is as in plain answering, so a method is its own file alone.

The life of a batch: ``views`` may add rows; one compiled pass over the prompts keeps what ``capture`` asks for and runs
``reader`` on it; ``second`` may then show another picture, or change the model from here on; ``rule`` decodes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from PIL import Image

from jaxmllm.decoding.rules import OneByOne, Rule
from jaxmllm.decoding.sampling import Sampling
from jaxmllm.methods.regions import Box, ImageMap
from jaxmllm.models.capture import Capture
from jaxmllm.models.edits import Edits
from jaxmllm.models.inputs import Inputs

if TYPE_CHECKING:
    from jaxmllm.decoding.generate import Reader
    from jaxmllm.methods.first import First


# An option that may be given as a whole number too.
Number = float | int


@dataclasses.dataclass(frozen=True)
class Second:
    """What a second pass is about.

    Attributes:
      pictures: one an example, shown behind its own in a prompt with two; only what follows the first is computed.
      boxes: what part of the original each picture is, if it is one.
      edits: interventions that hold from here on. Without pictures the prompt's tokens from ``again`` on are run again
        under them: its ``last`` token, or the whole ``question`` behind the image.
      maps: what was found on the way, one an example, to be looked at.
    """

    pictures: tuple[Image.Image, ...] | None = None
    boxes: tuple[Box, ...] | None = None
    edits: Edits | None = None
    again: str = "last"
    maps: tuple[ImageMap, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Method:
    """Plain answering; methods override what they do otherwise.

    Attributes:
      name: what commands call it.
      presets: named options, such as those of a paper and of its code where they differ.
    """

    name: ClassVar[str] = "base"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    @property
    def weight(self) -> int:
        """How many times the memory of a plain row it takes, about."""
        return 1

    @property
    def decodes(self) -> int:
        """Tokens that ``second`` decodes behind the first prompts, which room is kept for."""
        return 0

    def capture(self, num_layers: int) -> Capture:
        """Sites to keep of the pass over the prompts."""
        return Capture()

    def reader(self, num_layers: int) -> Reader | None:
        """What is made of them within the compiled program."""
        return None

    def edits(self, num_layers: int) -> Edits | None:
        """Interventions that hold throughout, composed with the caller's."""
        return None

    def views(self, model: Any, inputs: Inputs, row_numbers: Sequence[int]) -> Inputs:
        """The rows of the pass over the prompts: the examples themselves, then as many again for each other view."""
        return inputs

    def second(self, first: First) -> Second | None:
        """What follows from the first pass; ``None`` goes on to decode."""
        return None

    def rule(self, num_layers: int, sampling: Sampling | None) -> Rule:
        """How tokens are chosen."""
        return OneByOne(sampling)
