"""What a method sees of the first pass over a batch, and how it asks more about the same pictures."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from jaxmllm.analysis.geometry import looks_of, patch_boxes
from jaxmllm.decoding.cache import Cache
from jaxmllm.decoding.generate import Prompts, ending_of, room_for, run_prompts, run_tail, run_tokens
from jaxmllm.decoding.rules import Decoded, OneByOne
from jaxmllm.errors import InputError
from jaxmllm.methods import tails
from jaxmllm.methods.regions import Edge, ImageMap
from jaxmllm.models import forward as pure
from jaxmllm.models.capture import ATTENTION, Capture
from jaxmllm.models.edits import Edits
from jaxmllm.models.inputs import Inputs
from jaxmllm.models.sharding import put_rows, to_host
from jaxmllm.processing import make_prompt, prepare

# Known evidence boxes of an example in pixels; ``None`` where they are not known.
Evidence = Sequence[Sequence[Edge]] | None
# Another question as it is asked about an example, plain or as a whole prompt: question, number of the example -> text.
AskIn = Callable[[str, int], str]


@dataclasses.dataclass
class Count:
    """Passes that were made, an example.

    Attributes:
      prompts: over prompts, or over what differs from prompts that were run before.
      backward: gradients through such passes.
      tokens: over single tokens, those that were generated and those that were run again.
    """

    prompts: float = 0
    backward: float = 0
    tokens: float = 0


@dataclasses.dataclass
class First:
    """The first pass over a batch of B examples, one image each.

    Attributes:
      model, params: of the model.
      images: upright RGB, a list an example; ``questions`` as they were asked.
      ask_in: makes the prompt of another question.
      row_numbers: what the examples are counted as.
      evidence: known evidence boxes of each example in pixels, where there are any.
      inputs: the prompts' arrays, padded to a bucket.
      edits: interventions in force.
      prompts, cache: what the pass left. Decoding fills slots behind the prompts alone, so it takes nothing away.
      count: passes so far.
    """

    model: Any
    params: pure.Params
    images: Sequence[Sequence[Image.Image]]
    questions: Sequence[str]
    ask_in: AskIn
    row_numbers: tuple[int, ...]
    evidence: tuple[Evidence, ...]
    inputs: Inputs
    edits: Edits | None
    prompts: Prompts
    cache: Cache
    count: Count

    @property
    def num_layers(self) -> int:
        """L, decoder layers of the model."""
        return self.model.num_layers

    @functools.cached_property
    def pictures(self) -> tuple[Image.Image, ...]:
        """The one picture of every example."""
        return tuple(own[0] for own in self.images)

    @functools.cached_property
    def texts(self) -> tuple[str, ...]:
        """The whole prompts."""
        processor = self.model.processor
        return tuple(
            make_prompt(processor, text, len(own)) for text, own in zip(self.questions, self.images, strict=True)
        )

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Width and height of every picture."""
        return [picture.size for picture in self.pictures]

    def attention(self) -> Float[np.ndarray, "L B N"]:
        """Attention of the last prompt token to the image tokens, averaged over the heads, where it was captured."""
        return to_host(self.prompts.captured[ATTENTION])[:, :, 0]

    def on_patches(
        self, values: Float[np.ndarray, "*axes B N"], inputs: Inputs | None = None, nth: int | None = None
    ) -> list[Float[np.ndarray, "..."]]:
        """Values of image tokens, given to the patches they stand for; where image tokens look at patches by
        cross-attention, each hands its value on in the proportion in which it looked at them.

        Args:
          values: of the B examples.
          inputs: the prompts whose image tokens they are; by default those of the first pass.
          nth: the cross-attention that counts; by default the mean of all.
        """
        images = (self.inputs if inputs is None else inputs).images
        assert images is not None
        counts = np.asarray(images.counts)
        parts = [values[..., row, : counts[row]] for row in range(len(counts))]
        if self.model.family.patch_boxes is None:
            return parts
        looks = looks_of(self.model, images, nth, self.params)
        return [part @ look for part, look in zip(parts, looks, strict=True)]

    def maps(self, values: Sequence[Float[np.ndarray, " _"]]) -> tuple[ImageMap, ...]:
        """Values of patches with the pixels these saw."""
        boxes = patch_boxes(self.model, self.sizes)
        return tuple(ImageMap(np.asarray(part), tokens) for part, tokens in zip(values, boxes, strict=True))

    def ask(self, question: str, capture: Capture, max_new_tokens: int = 1) -> tuple[Prompts, Cache, Inputs]:
        """Another question about the same pictures.

        What the prompts share, their images above all, is not computed again, unless the model's image tokens depend on
        the question.

        Returns:
          What the pass left, its cache, and the inputs that hold its image tokens.
        """
        processor = self.model.processor
        texts = [make_prompt(processor, self.ask_in(question, row), 1) for row in range(len(self.pictures))]
        room, model = room_for(max_new_tokens), self.model
        self.count.prompts += 1
        if model.family.reads_question:
            inputs = model.as_inputs(prepare(processor, self.pictures, texts), bucketed=True)
            asked = put_rows(inputs, model.mesh)
            return *run_prompts(model.graphdef, self.params, asked, self.edits, capture, room), inputs
        tail, keep = tails.of_texts(model, self.inputs, texts)
        tail = put_rows(tail, model.mesh)
        before = self.prompts.bare(), self.cache, keep
        passed = run_tail(model.graphdef, self.params, *before, tail, self.edits, capture, room)
        return *passed, self.inputs

    def decode(self, prompts: Prompts, cache: Cache, record: Capture, max_new_tokens: int) -> Decoded:
        """Greedy answers after a pass over prompts; the cache is used up, and comes back in what is returned."""
        done = run_tokens(
            self.model.graphdef,
            self.params,
            prompts,
            cache,
            self.edits,
            OneByOne(record=record),
            None,
            ending_of(self.model),
            np.int32(max_new_tokens),
            prompts.layout.length - prompts.ids.shape[1],
        )
        self.count.tokens += float(to_host(done.passes))
        return done


def one_image(inputs: Inputs, name: str) -> None:
    """Raises InputError where examples have not one image each."""
    images = 0 if inputs.images is None else len(inputs.images)
    if images != len(inputs.input_ids):
        raise InputError(
            f"method {name!r} looks at one image an example; there are {images} for {len(inputs.input_ids)} examples"
        )
