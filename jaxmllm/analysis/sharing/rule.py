"""The one rule of the fast sweep: what an edit leaves untouched, and what it makes independent of the content.

A sequence is cut into four segments, in this order: **head** (what stands before the first image token), **body** (the
image tokens, with any text between images), **question** (the rest of the prompt but its last token) and **answer**
(the last prompt token and the answer's tokens, where the answer is read). No segment sees a later one.

A *node* is a segment at the input of a layer. Under an edit a node is

- **unchanged**, if no path leads from an edited node to it. It is reused from the clean run.
- else **changed**, and has to be computed again, but only once for all examples on whose content it depends. How far
  that reaches is its *tier*: a node depends on the content of all nodes it sees, unless an edit wiped them.

    GROUP     the text around the image alone: one computation serves every example of a group
    CONTEXT   the image too: one computation serves every question on that image
    ROW       the question too: each example has its own

``trace`` below is this rule, and there is no other place that decides what is shared. It knows no family and no kind of
edit; erasing an image merely turns out to leave a GROUP trajectory, knockouts of the question an unchanged body, and
what stands before the first image token never changes.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence

import numpy as np


class Segment(enum.IntEnum):
    """A part of the sequence; later ones see earlier ones."""

    HEAD = 0
    BODY = 1
    QUESTION = 2
    ANSWER = 3


class Tier(enum.IntEnum):
    """On whose content a value depends, and so how many examples one computation serves."""

    GROUP = 0
    CONTEXT = 1
    ROW = 2


@dataclasses.dataclass(frozen=True)
class Touch:
    """Where one branch's edits act, for every layer and segment; the tier is that of the edit's own numbers.

    Attributes:
      wipes ``[L, 4]``: the residual stream of the whole segment is set to zero at the layer's input.
      inputs ``[L, 4]``: the residual stream is changed at the layer's input.
      keys ``[L, 4]``: what later positions see of the segment in this layer is changed, beyond its input.
      outputs ``[L, 4]``: what the layer computes for the segment is changed, beyond its inputs.
      tier ``[L, 4]``.
    """

    wipes: np.ndarray
    inputs: np.ndarray
    keys: np.ndarray
    outputs: np.ndarray
    tier: np.ndarray


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """What has to be computed for one branch.

    Attributes:
      runs ``[L, 4]``: the segment passes through this layer again.
      tier ``[L, 4]``: of that computation.
      wiped ``[L, 4]``: the run starts from zeros, whatever the state was.
    """

    runs: np.ndarray
    tier: np.ndarray
    wiped: np.ndarray

    @property
    def num_layers(self) -> int:
        """L."""
        return self.runs.shape[0]

    @property
    def start(self) -> int:
        """The first layer at which anything runs; L if the edit changes nothing."""
        return int(np.argmax(self.runs.any(axis=1))) if self.runs.any() else self.num_layers

    @property
    def changes_answer(self) -> bool:
        """Whether the answer differs from the clean one at all."""
        return bool(self.runs[-1, Segment.ANSWER])

    def from_clean(self, layer: int, segment: int) -> bool:
        """Whether a run starts from the clean run's state: the first run of a segment, unless wiped."""
        return bool(
            self.runs[layer, segment] and not self.wiped[layer, segment] and not self.runs[:layer, segment].any()
        )

    def reads_clean_keys(self, layer: int, segment: int) -> bool:
        """Whether a later segment runs at this layer while this one does not."""
        return bool(not self.runs[layer, segment] and self.runs[layer, segment + 1 :].any())


def trace(touch: Touch, content: Sequence[Tier], present: Sequence[bool]) -> Trajectory:
    """Follows one branch's edits through the layers.

    Args:
      touch: where they act.
      content: on whose content each segment depends before layer 0; that of the head is also what positions depend on,
        which is all that a wiped segment does.
      present: which segments have any positions.

    Returns:
      What runs, at which tier. Of the last layer the answer needs no more of the other segments than their keys, so
      there they run only if these change.
    """
    num_layers = touch.tier.shape[0]
    runs = np.zeros((num_layers, 4), bool)
    tiers = np.zeros((num_layers, 4), int)
    wiped = np.zeros((num_layers, 4), bool)
    changed = [False] * 4
    tier = list(content)
    segments = [segment for segment in Segment if present[segment]]
    for layer in range(num_layers):
        last = layer == num_layers - 1
        for segment in segments:
            if touch.inputs[layer, segment]:
                changed[segment] = True
                own = content[Segment.HEAD] if touch.wipes[layer, segment] else tier[segment]
                tier[segment] = Tier(max(own, touch.tier[layer, segment]))
        seen_changed, seen_tier = False, content[Segment.HEAD]
        after_changed, after_tier = list(changed), list(tier)
        for segment in segments:
            seen_changed = seen_changed or changed[segment] or bool(touch.keys[layer, segment])
            seen_tier = Tier(max(seen_tier, tier[segment], touch.tier[layer, segment]))
            after_changed[segment] = seen_changed or bool(touch.outputs[layer, segment])
            after_tier[segment] = seen_tier
            keys_alone = last and segment != Segment.ANSWER
            keys_change = changed[segment] or bool(touch.keys[layer, segment])
            runs[layer, segment] = keys_change if keys_alone else after_changed[segment]
            tiers[layer, segment] = max(tier[segment], touch.tier[layer, segment]) if keys_alone else seen_tier
            wiped[layer, segment] = touch.wipes[layer, segment]
        changed, tier = after_changed, after_tier
    return Trajectory(runs, tiers, wiped)
