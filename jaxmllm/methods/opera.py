"""OPERA: beam search in which tokens that lean on one earlier token alone are penalised, and taken back in the end.

Source: Huang et al., "OPERA" (arXiv 2311.17911); shikiw/OPERA@61426ef: ``opera_beam_search``, whose order of steps,
counters and exceptions are followed. What differs: one example's search does not depend on others, and answers may have
at most as many tokens as the history window.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxmllm.decoding.beams import Ended, Tree, along, choose_beams, grow, path_values, plant, rooted
from jaxmllm.decoding.rules import Decoded, Decoding, Rule
from jaxmllm.decoding.sampling import Sampling
from jaxmllm.errors import InputError
from jaxmllm.methods.base import Method, Number
from jaxmllm.models.capture import Capture
from jaxmllm.models.layers import Leaf

# Of the official code: the factor of a column's product, answers that are judged by the image instead, the first depth
# that can be gone back to, and what stands for minus infinity.
COLUMN_FACTOR = 1e-7
EARLY = 10
FIRST_BACK = 10
LEFT_OUT = -999.0


def column_scores(rows: Float[Array, "*axes T T"], length: Leaf, scale: Leaf) -> Float[Array, "*axes T"]:
    """How much all later tokens lean on each token: ``1e-7 prod over i >= j of scale * W_ij``; 0 behind the last.

    Args:
      rows: attention of each token to each, rows renormalised; what is behind ``length`` does not count.
      length: tokens, the candidate included.
      scale: sigma.
    """
    place = jnp.arange(rows.shape[-1])
    counts = (place[:, None] >= place) & (place[:, None] < length)
    scores = COLUMN_FACTOR * jnp.where(counts, scale * rows, 1.0).prod(axis=-2)
    return jnp.where(place < length, scores, 0.0)


def most_frequent(values: Int[Array, "*axes n"]) -> Int[Array, "*axes"]:
    """The value that occurs most often on the last axis; of equals the smallest."""
    times = (values[..., :, None] == values[..., None, :]).sum(axis=-1)
    most = times == times.max(axis=-1, keepdims=True)
    return jnp.where(most, values, jnp.iinfo(jnp.int32).max).min(axis=-1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Search:
    """The state of one example's search; what has a leading T is kept by depth.

    Attributes:
      tree: keys and values of everything taken so far.
      length ``[]``: tokens of every beam.
      done ``[]``: whether nothing better can come.
      logits ``[R, V]``: of the beams' next token.
      paths ``[T + 1, R, T]``: rows of the beams' tokens, by the length at which they held.
      scores ``[T + 1, R]``: log-probabilities of the beams, likewise.
      tokens ``[T, R]``, parents ``[T, R]``, token_scores ``[T, R]``: what was taken; token_scores are the model's own
        log-probabilities.
      rows ``[T, R, T]``: renormalised attention of each token to its path.
      places ``[T, R]``: where each beam leant most, at each length.
      ended: answers that have ended; ``ended_at`` what they were at each length, ``shared`` the length whose record is
        the running one: the official code goes back to a record without copying it, and then writes into it.
      backs ``[T]``: how often each length was gone back to.
      banned ``[T, C, R]``, banned_count ``[T]``: choices that were taken back there, as beam x V + token.
      passes ``[]``: tokens run through the model.
    """

    tree: Tree
    length: Leaf
    done: Leaf
    logits: Leaf
    paths: Leaf
    scores: Leaf
    tokens: Leaf
    parents: Leaf
    token_scores: Leaf
    rows: Leaf
    places: Leaf
    ended: Ended
    ended_at: Ended
    shared: Leaf
    backs: Leaf
    banned: Leaf
    banned_count: Leaf
    passes: Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OperaRule:
    """Beam search by OPERA's rules; attributes as of ``Opera``."""

    scale: Leaf
    threshold: Leaf
    penalty_weight: Leaf
    window: Leaf
    beams: int = dataclasses.field(metadata={"static": True})
    candidates: int = dataclasses.field(metadata={"static": True})
    half_scores: bool = dataclasses.field(metadata={"static": True})
    rows: int = dataclasses.field(default=1, metadata={"static": True})
    capture: Capture = dataclasses.field(default=Capture(), metadata={"static": True})

    def decode(self, decoding: Decoding) -> Decoded:
        """See ``Rule``; examples are searched one after the other."""
        prompts = decoding.prompts
        shown = prompts.layout.image[:, : decoding.first_slot]
        given = prompts.layout.valid[:, : decoding.first_slot]
        # the official prompt counts an image as one token
        counted = (given & ~shown).sum(axis=1) + shown.any(axis=1)
        found = jax.lax.map(
            lambda one: self.search(decoding, *one), (plant(decoding, self.beams), prompts.logits, counted)
        )
        tokens, log_probabilities, lengths, stopped, passes = found
        return Decoded(
            steps=lengths.max(),
            tokens=tokens,
            log_probabilities=log_probabilities,
            lengths=lengths,
            stopped=stopped,
            cache=decoding.cache,
            passes=passes.mean(),
            recorded={},
        )

    def search(
        self, decoding: Decoding, tree: Tree, logits: Float[Array, " V"], counted: Int[Array, ""]
    ) -> tuple[Array, ...]:
        """The best answer of one example."""
        state = jax.lax.while_loop(
            lambda state: ~state.done & (state.length < decoding.ending.limit),
            lambda state: self.advance(decoding, state, counted),
            self.begin(tree, logits),
        )
        return self.finish(decoding, state, counted)

    def begin(self, tree: Tree, logits: Float[Array, " V"]) -> Search:
        """All beams at the prompt's end; only the first counts, so that they part."""
        depth, beams = tree.depth, self.beams
        by_depth = jnp.zeros((depth, beams))
        ints = by_depth.astype(jnp.int32)
        answers = jnp.zeros((beams, depth))
        none = Ended(jnp.full(beams, -jnp.inf), answers.astype(jnp.int32), answers, ints[0])
        return Search(
            tree=tree,
            length=jnp.int32(0),
            done=jnp.bool_(False),
            logits=jnp.broadcast_to(logits, (beams, len(logits))),
            paths=jnp.zeros((depth + 1, beams, depth), jnp.int32),
            scores=jnp.zeros((depth + 1, beams)).at[0, 1:].set(-1e9),
            tokens=ints,
            parents=ints,
            token_scores=by_depth,
            rows=jnp.zeros((depth, beams, depth)),
            places=ints,
            ended=none,
            ended_at=jax.tree.map(lambda values: jnp.broadcast_to(values, (depth, *values.shape)), none),
            shared=jnp.int32(-1),
            backs=ints[:, 0],
            banned=jnp.zeros((depth, self.candidates, beams), jnp.int32),
            banned_count=ints[:, 0],
            passes=jnp.int32(0),
        )

    def advance(self, decoding: Decoding, state: Search, counted: Int[Array, ""]) -> Search:
        """One step: candidates are looked at, beams go on or back."""
        now = state.length
        candidate_scores, candidate_tokens = jax.lax.top_k(state.logits, self.candidates)
        penalties, places = self.judge(decoding, state, candidate_tokens)
        state = dataclasses.replace(
            state,
            places=state.places.at[now].set(most_frequent(places)),
            ended_at=jax.tree.map(lambda all_, one: all_.at[now].set(one), state.ended_at, state.ended),
            passes=state.passes + self.beams * self.candidates,
        )
        back, to = self.where_back(state, most_frequent(most_frequent(places)))
        plain = jnp.full_like(state.logits, LEFT_OUT)
        rows = jnp.arange(self.beams)[:, None]
        plain = plain.at[rows, candidate_tokens].set(candidate_scores - penalties)
        state, next_logits = jax.lax.cond(back, lambda: self.go_back(decoding, state, to), lambda: (state, plain))
        return self.take(decoding, state, next_logits, counted)

    def judge(
        self, decoding: Decoding, state: Search, candidates: Int[Array, "R C"]
    ) -> tuple[Float[Array, "R C"], Int[Array, "R C"]]:
        """Penalty of every candidate, and the depth it makes its beam lean on."""
        tree, now, number = state.tree, state.length, self.candidates
        paths = state.paths[now]
        repeated = jnp.repeat(paths, number, axis=0)
        _, attention, _ = grow(decoding, tree, candidates.reshape(-1), now, repeated)
        total = attention.sum(axis=-1, keepdims=True)
        own = (along(attention, tree, now) / total).reshape(self.beams, number, -1)
        before = jax.vmap(lambda path: path_values(state.rows, path))(paths)  # [R, T, T]
        last = jnp.arange(tree.depth)[:, None] == now
        local = jnp.where(last, own[:, :, None, :], before[:, None])
        leaning = self.rounded(column_scores(local, now + 1, self.scale))
        places = jnp.argmax(leaning, axis=-1)
        shown = tree.layout.image[:, : tree.prompt]
        of_image = jnp.where(shown, attention[:, : tree.prompt], 0.0).sum(axis=-1) / total[:, 0]
        early = now + 1 <= EARLY
        for_image = -self.penalty_weight * of_image.reshape(self.beams, number)
        return jnp.where(early, for_image, self.rounded(self.penalty_weight * leaning.max(axis=-1))), places

    def rounded(self, values: Float[Array, "*axes"]) -> Float[Array, "*axes"]:
        """Numbers as float16 holds them, where the scores of columns are kept so."""
        return values.astype(jnp.float16).astype(jnp.float32) if self.half_scores else values

    def where_back(self, state: Search, place: Int[Array, ""]) -> tuple[Bool[Array, ""], Int[Array, ""]]:
        """Whether all beams have leant on one place long enough, and the length to go back to."""
        counts = (jnp.arange(len(state.places)) <= state.length)[:, None]
        often = ((state.places == place) & counts).sum(axis=0) > self.threshold
        to = jnp.minimum(place + 1, len(state.backs) - 1)
        to = jnp.where(state.backs[to] >= self.candidates, to - 1, to)
        possible = (place >= FIRST_BACK) & (state.backs[to] < self.candidates)
        return often.all() & possible, to

    def go_back(self, decoding: Decoding, state: Search, to: Int[Array, ""]) -> tuple[Search, Float[Array, "R V"]]:
        """The beams of an earlier length, and logits without the choices that were made there."""
        shared = jnp.where(state.shared >= 0, state.shared, len(state.backs))
        ended_at = jax.tree.map(lambda all_, one: all_.at[shared].set(one, mode="drop"), state.ended_at, state.ended)
        place = jnp.arange(len(state.backs))
        # the official code clears the lists of what is undone from the end of its window, not where they stand
        undone = jnp.maximum(state.length - to - 1, 0)
        cleared = (place >= self.window - undone) | (place == to + 1)
        counts = jnp.where(cleared, 0, state.banned_count)
        choices = state.parents[to] * state.logits.shape[-1] + state.tokens[to]
        banned = state.banned.at[to, counts[to]].set(choices)
        counts = counts.at[to].add(1)
        paths = state.paths[to]
        last = state.tokens[to - 1, jnp.arange(self.beams)]
        logits, _, _ = grow(decoding, state.tree, last, to - 1, paths)
        logits = logits - (999.0 + logits.min(axis=-1, keepdims=True))
        listed = jnp.arange(self.candidates)[:, None] < counts[to]
        nowhere = logits.size
        logits = logits.reshape(-1).at[jnp.where(listed, banned[to], nowhere)].set(LEFT_OUT, mode="drop")
        state = dataclasses.replace(
            state,
            length=to,
            backs=state.backs.at[to].add(1),
            banned=banned,
            banned_count=counts,
            ended=jax.tree.map(lambda all_: all_[to], ended_at),
            ended_at=ended_at,
            shared=to,
            passes=state.passes + self.beams,
        )
        return state, logits.reshape(self.beams, -1)

    def take(self, decoding: Decoding, state: Search, logits: Float[Array, "R V"], counted: Int[Array, ""]) -> Search:
        """Goes on by one token, and runs it through the model."""
        now, words = state.length, logits.shape[-1]
        scores = jax.nn.log_softmax(logits, axis=-1) + state.scores[now][:, None]
        chosen = choose_beams(scores, decoding.ending.stops(jnp.arange(words)))
        own = jax.nn.log_softmax(state.logits, axis=-1)
        paths = state.paths[now][chosen.parents].at[:, now].set(jnp.arange(self.beams))
        ended = state.ended
        for rank in range(self.beams):
            parent, token = chosen.best_parents[rank], chosen.best_tokens[rank]
            answer, answer_scores = self.answer(state, parent, now)
            ended = ended.add(
                decoding.ending.stops(token),
                chosen.best_scores[rank] / (counted + now),
                answer.at[now].set(token),
                answer_scores.at[now].set(own[parent, token]),
                now,
            )
        full = jnp.isfinite(ended.scores).all()
        done = full & (ended.scores.min() >= chosen.best_scores[0] / (counted + now + 1))
        state = dataclasses.replace(
            state,
            length=now + 1,
            done=done,
            paths=state.paths.at[now + 1].set(paths),
            scores=state.scores.at[now + 1].set(chosen.scores),
            tokens=state.tokens.at[now].set(chosen.tokens),
            parents=state.parents.at[now].set(chosen.parents),
            token_scores=state.token_scores.at[now].set(own[chosen.parents, chosen.tokens]),
            ended=ended,
        )
        return jax.lax.cond(
            done | (state.length >= decoding.ending.limit), lambda: state, lambda: self.run(decoding, state)
        )

    def answer(
        self, state: Search, beam: Int[Array, ""], length: Int[Array, ""]
    ) -> tuple[Int[Array, " T"], Float[Array, " T"]]:
        """The tokens of a beam of some length, and the model's log-probabilities of them; zeros behind."""
        path = state.paths[length, beam]
        here = jnp.arange(len(path)) < length
        tokens, scores = path_values(state.tokens, path), path_values(state.token_scores, path)
        return jnp.where(here, tokens, 0), jnp.where(here, scores, 0.0)

    def run(self, decoding: Decoding, state: Search) -> Search:
        """The pass over the tokens that were taken last."""
        last = state.length - 1
        logits, attention, own = grow(decoding, state.tree, state.tokens[last], last, state.paths[state.length])
        rows = along(attention, state.tree, last) / attention.sum(axis=-1, keepdims=True)
        return dataclasses.replace(
            state,
            tree=rooted(state.tree, own, last),
            logits=logits,
            rows=state.rows.at[last].set(rows),
            passes=state.passes + self.beams,
        )

    def finish(self, decoding: Decoding, state: Search, counted: Int[Array, ""]) -> tuple[Array, ...]:
        """The best of what has ended and, unless the search was done, of what is still open."""
        ending, beams = decoding.ending, self.beams
        open_ = jnp.where(state.done, -jnp.inf, state.scores[state.length] / (counted + state.length))
        scores = jnp.concatenate([state.ended.scores, open_])
        best = len(scores) - 1 - jnp.argmax(scores[::-1])  # the last of equals
        stopped = best < beams
        at = jnp.minimum(best, beams - 1)
        tokens, token_scores = self.answer(state, jnp.maximum(best - beams, 0), state.length)
        tokens = jnp.where(stopped, state.ended.tokens[at], tokens)
        token_scores = jnp.where(stopped, state.ended.token_scores[at], token_scores)
        length = jnp.where(stopped, state.ended.lengths[at] + 1, state.length)
        tokens = jnp.where(jnp.arange(len(tokens)) < length, tokens, ending.pad_token)
        return tokens, token_scores, length, stopped, state.passes


@dataclasses.dataclass(frozen=True)
class Opera(Method):
    """Beam search with a penalty on over-trust, and retrospection.

    Of every beam the most probable tokens are tried. The first ten tokens are favoured by their attention to the
    image; later ones are penalised by the column of attention, within the answer, that all later tokens lean on most.
    Where all beams have leant on one token often enough, the search goes back behind it and chooses otherwise.

    Attributes:
      beams: R; ``candidates`` tokens that are tried of each.
      scale: sigma, on attention weights.
      threshold: how often one place must be leant on, at least, before the search goes back.
      penalty_weight: alpha.
      window: history, in tokens; answers may not be longer.
      half_scores: whether scores of columns are rounded to float16, in which the official code keeps them.
    """

    name: ClassVar[str] = "opera"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "code": {},
        "fast": {"candidates": 1, "threshold": 25},
        "paper": {"half_scores": False},
    }

    beams: int = 5
    candidates: int = 5
    scale: Number = 50.0
    threshold: int = 15
    penalty_weight: Number = 1.0
    window: int = 512
    half_scores: bool = True

    def __post_init__(self) -> None:
        if self.beams < 2 or self.candidates < 1 or self.threshold < 2 or self.window < 1:
            raise InputError(
                f"beams={self.beams}, candidates={self.candidates}, threshold={self.threshold}, window={self.window}; "
                "expected at least 2 beams, 1 candidate, a threshold from 2 and a window from 1"
            )

    @property
    def weight(self) -> int:
        return 2

    def rule(self, num_layers: int, sampling: Sampling | None) -> Rule:
        if sampling is not None:
            raise InputError(f"method {self.name!r} is a beam search; it draws no tokens")
        return OperaRule(
            scale=np.float32(self.scale),
            threshold=np.int32(self.threshold),
            penalty_weight=np.float32(self.penalty_weight),
            window=np.int32(self.window),
            beams=self.beams,
            candidates=self.candidates,
            half_scores=self.half_scores,
        )
