"""OPERA's beam search with over-trust penalty and rollback, without a cache, for one prompt.

shikiw/OPERA@61426ef: transformers-4.29.2/src/transformers/generation/utils.py, generation/beam_search.py and
minigpt4/models/llava.py.
"""

import copy
import dataclasses
from collections.abc import Callable

import numpy as np

EARLY = 10  # up to this response length candidates answer to image attention; no rollback goes to an earlier column
BANNED = -999.0

Model = Callable[[list[int]], tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Step:
    """One pass of the loop: ``candidates`` and ``penalties`` are ``[beams, candidates]``, ``locations`` ``[beams]``.

    They describe the beams as they stood when the pass began, also where it then rolled back. ``length`` counts the
    candidate; ``rollback`` is the response position that is chosen anew; ``chosen`` pairs a beam with its new token.
    """

    length: int
    candidates: np.ndarray
    penalties: np.ndarray
    locations: np.ndarray
    rollback: int | None
    chosen: list[tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class OperaResult:
    """The best sequence's new tokens, its sum of log-probabilities over its length, and every pass of the loop."""

    tokens: list[int]
    score: float
    trace: list[Step]


@dataclasses.dataclass
class Hypotheses:
    """Finished sequences, at most ``size`` of them, and whether no beam can better them."""

    size: int
    entries: list[tuple[float, list[int]]] = dataclasses.field(default_factory=list)
    worst: float = 1e9
    done: bool = False

    def add(self, tokens: list[int], total: float, length: int) -> None:
        score = total / length
        if len(self.entries) == self.size and score <= self.worst:
            return
        self.entries.append((score, tokens))
        if len(self.entries) <= self.size:
            self.worst = min(score, self.worst)
            return
        order = sorted(range(len(self.entries)), key=lambda index: (self.entries[index][0], index))
        self.worst = self.entries[order[1]][0]
        del self.entries[order[0]]

    def check(self, best_total: float, length: int) -> None:
        enough = len(self.entries) >= self.size
        self.done = self.done or (enough and self.worst >= best_total / length)

    def best(self) -> tuple[float, list[int]]:
        """The highest score, the latest of equals."""
        return sorted(self.entries, key=lambda entry: entry[0])[-1]


@dataclasses.dataclass(frozen=True)
class State:
    """What a rollback returns to: the beams before a choice, with the choice (``came_by``) that made them."""

    beams: list[list[int]]
    hypotheses: Hypotheses
    totals: np.ndarray
    candidates: np.ndarray
    candidate_logits: np.ndarray
    came_by: list[tuple[int, int]]


class NoRollbackError(Exception):
    """The beams do not agree on a column, or its positions are used up."""


def opera(
    model: Model,
    prompt: list[int],
    image_positions: tuple[int, int],
    *,
    eos: int,
    max_new_tokens: int,
    beams: int = 5,
    candidates: int = 5,
    scale: float = 50.0,
    threshold: int = 15,
    penalty_weight: float = 1.0,
    window: int = 512,
    prompt_tokens: int | None = None,
    half_scores: bool = True,
) -> OperaResult:
    """Decodes with ``model(tokens)``, which gives logits ``[V]`` of the next token and attention ``[T, T]``.

    The attention is that of the last layer, the largest of its heads. ``image_positions`` are the first and the last.
    """
    first, last = image_positions
    if prompt_tokens is None:
        prompt_tokens = len(prompt) - (last - first + 1) + 1
    sequences: list[list[int]] = [[] for _ in range(beams)]
    totals = np.full(beams, -1e9, np.float32)
    totals[0] = 0
    hypotheses = Hypotheses(beams)
    came_by: list[tuple[int, int]] = []
    history: list[State] = []
    located: list[np.ndarray] = []
    visits = np.zeros(window, int)
    rejected: list[list[tuple[int, int]]] = [[] for _ in range(window)]
    trace = []

    while True:
        logits = np.stack([model(prompt + sequence)[0] for sequence in sequences])
        tried = np.argsort(-logits, axis=-1, kind="stable")[:, :candidates]
        length = len(sequences[0]) + 1

        penalties = np.zeros(tried.shape, np.float32)
        columns = np.zeros(tried.shape, int)
        for beam, candidate in np.ndindex(*tried.shape):
            attention = model([*prompt, *sequences[beam], int(tried[beam, candidate])])[1].astype(np.float32)
            attention = attention / attention.sum(-1, keepdims=True)
            scores = column_scores(scale * attention[len(prompt) :, len(prompt) :], half_scores)
            columns[beam, candidate] = scores.argmax()
            if length <= EARLY:
                penalties[beam, candidate] = -attention[-1, first : last + 1].sum()
            else:
                penalties[beam, candidate] = scores.max()
        locations = np.array([mode(row) for row in columns])
        # not reordered when beams are: row i belongs to whichever beam was i-th at the time
        located.append(locations)

        weighted = penalty_weight * penalties
        if half_scores and length > EARLY:
            weighted = rounded(weighted)
        tried_logits = np.take_along_axis(logits, tried, axis=-1) - weighted
        if len(history) >= window:
            history.pop(0)
        history.append(State(sequences, copy.deepcopy(hypotheses), totals, tried, tried_logits, came_by))
        step = Step(length, tried, penalties, locations, None, [])

        try:
            position = rollback_position(mode(locations), located, visits, candidates, threshold)
            if length - position > window + 1:
                position = max(1, length - window - 1)
            for back in range(length - position - 2):
                history.pop()
                located.pop()
                rejected[-(back + 1)] = []  # counts from the end of the window, not from the newest position
            # raises where the window no longer holds the state, after the histories were cut
            state, following = history[-2], history[-1]
            sequences, totals, tried, tried_logits = state.beams, state.totals, state.candidates, state.candidate_logits
            # no copy: what finishes from here on stays in the stored state, and is there at the next rollback to it
            hypotheses = state.hypotheses
            logits = np.stack([model(prompt + sequence)[0] for sequence in sequences])
            history.pop()
            located.pop()
            rejected[position + 1] = []
            logits = logits - (np.float32(999) + logits.min(-1, keepdims=True))
            rejected[position] = rejected[position] + following.came_by
            for beam, token in rejected[position]:
                logits[beam, token] = BANNED
            step = dataclasses.replace(step, rollback=position)
        except (NoRollbackError, IndexError):
            logits = np.full_like(logits, BANNED)
            np.put_along_axis(logits, tried, tried_logits, axis=-1)

        sums = log_softmax(logits) + totals[:, None]
        best = np.argsort(-sums, axis=None, kind="stable")[: 2 * beams]
        ranked = list(zip(*np.unravel_index(best, sums.shape), strict=True))
        prefix = prompt_tokens + len(sequences[0])
        came_by = []
        for rank, (beam, token) in enumerate(ranked):
            if token != eos:
                came_by.append((int(beam), int(token)))
            elif rank < beams:
                hypotheses.add(sequences[beam], float(sums[beam, token]), prefix)
            if len(came_by) == beams:
                break
        hypotheses.check(float(sums[ranked[0]]), prefix + 1)
        trace.append(dataclasses.replace(step, chosen=came_by))

        totals = np.array([sums[pair] for pair in came_by])
        sequences = [[*sequences[beam], token] for beam, token in came_by]
        if hypotheses.done or len(sequences[0]) >= max_new_tokens:
            break

    if not hypotheses.done:
        for sequence, total in zip(sequences, totals, strict=True):
            hypotheses.add(sequence, float(total), prompt_tokens + len(sequence))
    score, tokens = hypotheses.best()
    return OperaResult([*tokens, eos] if len(tokens) < max_new_tokens else tokens, score, trace)


def rollback_position(
    column: int, located: list[np.ndarray], visits: np.ndarray, most_visits: int, threshold: int
) -> int:
    """The response position to choose anew, counted as visited; each can be visited ``most_visits`` times."""
    held = (np.stack(located) == column).sum(0)
    if not (held > threshold).all() or column < EARLY:
        raise NoRollbackError
    position = column + 1
    if visits[position] >= most_visits:
        position -= 1
        if visits[position] >= most_visits:
            raise NoRollbackError
    visits[position] += 1
    return position


def column_scores(weights: np.ndarray, half: bool) -> np.ndarray:
    """Products down each column of the scaled attention among response tokens ``[L, L]``, from the diagonal on."""
    with np.errstate(over="ignore", under="ignore"):
        products = np.array([weights[column:, column].prod() for column in range(len(weights))], np.float32)
        scores = np.float32(1e-7) * products
    return rounded(scores) if half else scores


def rounded(values: np.ndarray) -> np.ndarray:
    """To half precision and back: small scores become 0, large ones infinite."""
    with np.errstate(over="ignore", under="ignore"):
        return values.astype(np.float16).astype(np.float32)


def mode(values: np.ndarray) -> int:
    """The most frequent value, the smallest of equals."""
    found, counts = np.unique(values, return_counts=True)
    return int(found[counts.argmax()])


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis, in the precision of the logits."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@dataclasses.dataclass(frozen=True)
class Scripted:
    """Tables instead of a transformer: tokens at ``sink_from`` and later may draw the attention of all that follow.

    Logits after position t are ``after[token t] + before[token t - 1] + rise[t]``. The score of row t and column j in
    head h is ``noise[h, token t, token j]``, plus ``held[h]`` where j is in the prompt, or plus
    ``pull[h, token j, token j + 1]`` where ``sink_from <= j < t``.
    """

    prompt_length: int
    sink_from: int
    after: np.ndarray  # [V, V]
    before: np.ndarray  # [V, V]
    rise: np.ndarray  # [positions, V]
    noise: np.ndarray  # [heads, V, V]
    held: np.ndarray  # [heads]
    pull: np.ndarray  # [heads, V, V]

    def __call__(self, tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Logits of the next token, and the attention of all, the largest of the heads."""
        ids = np.array(tokens)
        logits = self.after[ids[-1]] + self.before[ids[-2]] + self.rise[len(ids) - 1]
        scores = self.noise[:, ids[:, None], ids[None, :]]
        scores[:, :, : self.prompt_length] += self.held[:, None, None]
        for column in range(self.sink_from, len(ids) - 1):
            scores[:, column + 1 :, column] += self.pull[:, ids[column], ids[column + 1], None]
        scores = np.where(np.tri(len(ids), dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return logits, (weights / weights.sum(-1, keepdims=True)).max(0)


def scripted(
    seed: int,
    vocab: int,
    *,
    prompt_length: int,
    eos: int,
    longest: int = 256,
    heads: int = 2,
    sink_from: int = 10,
    stubborn: float = 0.1,
    pairs: float = 0.15,
    eos_start: float = -1.5,
    eos_rise: float = 0.1,
) -> Scripted:
    """A random model on which OPERA rolls back; ``sink_from`` counts from the response's start.

    A share ``stubborn`` of the tokens are sinks whatever follows, and a share ``pairs`` of the other pairs of tokens
    make their first a sink. The logit of ``eos`` starts at about ``eos_start`` and rises with each position.
    """
    rng = np.random.default_rng(seed)
    after, before = rng.normal(size=(2, vocab, vocab)) * 1.2
    rise = np.zeros((longest, vocab))
    after[:, eos] *= 0.5
    before[:, eos] *= 0.5
    rise[:, eos] = eos_start + eos_rise * np.maximum(np.arange(longest) - prompt_length, 0)
    sinks = (rng.random((vocab, 1)) < stubborn) | (rng.random((vocab, vocab)) < pairs)
    strength = rng.uniform(1.1, 1.5, size=(heads, vocab, vocab))
    tables = {
        "after": after,
        "before": before,
        "rise": rise,
        "noise": rng.normal(size=(heads, vocab, vocab)) * 0.1,
        # the prompt holds as much as some sixty response tokens, so that only sinks reach 1 / 50
        "held": np.full(heads, np.log(60 / prompt_length)),
        "pull": np.where(sinks, strength, 0.0),
    }
    return Scripted(
        prompt_length,
        prompt_length + sink_from,
        **{name: table.astype(np.float32) for name, table in tables.items()},
    )
