"""Controls: second pictures that no method chose. What a method gains over them is what its choice is worth."""

from __future__ import annotations

import abc
import dataclasses
from typing import ClassVar

import numpy as np
from PIL import Image

from jaxmllm.errors import InputError
from jaxmllm.methods.base import Method, Number, Second
from jaxmllm.methods.first import Evidence, First, one_image
from jaxmllm.methods.regions import Box, inside, squared


@dataclasses.dataclass(frozen=True)
class Crop(Method, abc.ABC):
    """Answers from the image and a square part of it.

    Attributes:
      share: the square's side as a share of the image's shorter side.
    """

    share: Number = 0.35

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise InputError(f"share is {self.share}; expected a number above 0, up to 1")

    @property
    def weight(self) -> int:
        return 2

    @abc.abstractmethod
    def box(self, size: tuple[int, int], number: int, evidence: Evidence) -> Box:
        """Which part of a picture is shown.

        Args:
          size: width and height of the picture.
          number: what the example is counted as.
          evidence: its known evidence boxes; ``None`` where they are not known.
        """

    def second(self, first: First) -> Second:
        one_image(first.inputs, self.name)
        of_examples = zip(first.sizes, first.row_numbers, first.evidence, strict=True)
        boxes = [inside(self.box(*of_example), of_example[0]) for of_example in of_examples]
        pictures: tuple[Image.Image, ...] = tuple(
            picture.crop(box) for picture, box in zip(first.pictures, boxes, strict=True)
        )
        return Second(pictures=pictures, boxes=tuple(boxes))


@dataclasses.dataclass(frozen=True)
class RandomCrop(Crop):
    """A square at a random place.

    Attributes:
      seed: with the number of the example it decides the place.
    """

    name: ClassVar[str] = "random-crop"
    seed: int = 0

    def box(self, size: tuple[int, int], number: int, evidence: Evidence) -> Box:
        width, height = size
        side = self.share * min(width, height)
        rng = np.random.default_rng([self.seed, number])
        left, top = rng.uniform(0, width - side), rng.uniform(0, height - side)
        return left, top, left + side, top + side


@dataclasses.dataclass(frozen=True)
class CentreCrop(Crop):
    """The square in the middle."""

    name: ClassVar[str] = "centre-crop"

    def box(self, size: tuple[int, int], number: int, evidence: Evidence) -> Box:
        middle = size[0] / 2, size[1] / 2
        return squared((*middle, *middle), size, self.share * min(size))


@dataclasses.dataclass(frozen=True)
class EvidenceCrop(Crop):
    """The square around the known evidence: what the best choice could do. The whole image where there is none."""

    name: ClassVar[str] = "evidence-crop"

    def box(self, size: tuple[int, int], number: int, evidence: Evidence) -> Box:
        if evidence is None:
            raise InputError(
                f"method {self.name!r} is told where the evidence is; the question has no boxes (LLaVA's JSONL: field "
                "'boxes'; in Python: evidence=)"
            )
        if not len(evidence):
            return 0, 0, size[0], size[1]
        edges = np.asarray(evidence, float)
        around = (*edges[:, :2].min(axis=0).tolist(), *edges[:, 2:].max(axis=0).tolist())
        return squared(around, size, self.share * min(size))


@dataclasses.dataclass(frozen=True)
class SecondLook(Method):
    """The whole image once more: the same passes and tokens as any crop, and no new pixel."""

    name: ClassVar[str] = "second-look"

    @property
    def weight(self) -> int:
        return 2

    def second(self, first: First) -> Second:
        one_image(first.inputs, self.name)
        return Second(pictures=first.pictures, boxes=tuple((0, 0, *size) for size in first.sizes))
