"""What each branch needs in one lane, by the rule."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jaxmllm.analysis.sharing.rule import Segment, Tier, Touch, Trajectory, trace
from jaxmllm.analysis.sharing.segments import Lane, Row
from jaxmllm.analysis.sharing.touch import Branch, Extent, touches


@dataclasses.dataclass(frozen=True)
class Needs:
    """What of the clean run has to be kept: layers and segments, of states and of keys."""

    hidden: frozenset[tuple[int, Segment]]
    keys: frozenset[tuple[int, Segment]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """One branch in one lane.

    Attributes:
      number: of the branch.
      branch: its edits, settled.
      touch: where they act.
      path: what has to be computed.
    """

    number: int
    branch: Branch
    touch: Touch
    path: Trajectory

    @property
    def needs(self) -> Needs:
        nodes = [(layer, segment) for layer in range(self.path.num_layers) for segment in Segment]
        return Needs(
            frozenset(node for node in nodes if self.path.from_clean(*node)),
            frozenset(node for node in nodes if self.path.reads_clean_keys(*node)),
        )


def plan_lane(branches: Sequence[Branch], rows: Sequence[Row], lane: Lane, num_layers: int) -> list[Plan]:
    """Applies the rule to every branch."""
    extents: dict[int, Extent] = {}
    plans = []
    for number, branch in enumerate(branches):
        touch = touches(branch, rows, lane, extents, num_layers)
        plans.append(Plan(number, branch, touch, trace(touch, lane.content, lane.present)))
    return plans


def waits(plan: Plan, lane: Lane) -> bool:
    """Whether a branch can wait for the whole block: it works on nothing but what all share and each row's tail.

    So it keeps nothing of a chunk but the tail's states, and computes what is shared once for all chunks.
    """
    path, needed = plan.path, plan.needs
    context = (Segment.HEAD, Segment.BODY)
    large = [node for node in needed.hidden | needed.keys if node[1] in context and lane.content[node[1]] != Tier.GROUP]
    large += [node for node in needed.keys if node[1] not in context]
    return (
        not large
        and not (path.runs & (path.tier == Tier.CONTEXT)).any()
        and not (path.runs[:, :2] & (path.tier[:, :2] == Tier.ROW)).any()
    )


def needs(plans: Sequence[Plan]) -> Needs:
    """What several branches need."""
    each = [plan.needs for plan in plans]
    return Needs(
        frozenset().union(*(needed.hidden for needed in each)), frozenset().union(*(needed.keys for needed in each))
    )
