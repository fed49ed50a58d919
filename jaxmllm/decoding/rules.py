"""Rules of decoding: how tokens follow from what the model says. All of them run over one key-value cache.

A rule is a pytree: its numbers are data, and only its structure decides what is compiled. ``OneByOne`` chooses a token
at a time for every example, and takes a ``Score`` that may look at more than the model's own logits: at the logits of
other views of the same example, or at sites captured on the way.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxmllm.decoding.cache import Cache, step
from jaxmllm.decoding.sampling import Sampling, choose
from jaxmllm.models.capture import Capture
from jaxmllm.models.edits import Edits
from jaxmllm.models.layers import Leaf

if TYPE_CHECKING:
    from jaxmllm.decoding.generate import Prompts


@dataclasses.dataclass(frozen=True)
class Ending:
    """When answers end.

    Attributes:
      stop_tokens ``[n]``: ids that end an answer.
      pad_token ``[]``: stands behind its end.
      limit ``[]``: tokens an answer has at most.
      room: slots there are for them.
    """

    stop_tokens: Leaf
    pad_token: Leaf
    limit: Leaf
    room: int

    def stops(self, tokens: Int[Array, "..."]) -> Bool[Array, "..."]:
        """Whether tokens end an answer."""
        return (tokens[..., None] == self.stop_tokens).any(axis=-1)


@dataclasses.dataclass(frozen=True)
class Decoding:
    """What a rule decodes with.

    Attributes:
      module: of the family.
      prompts: what the pass over them left; ``cache`` their keys and values.
      edits: interventions, which hold for generated tokens too.
      keys ``[B]``: a random key an example; ``None`` where nothing is drawn.
      ending: when answers end.
    """

    module: Any
    prompts: Prompts
    cache: Cache
    edits: Edits | None
    keys: Leaf | None
    ending: Ending

    @property
    def first_slot(self) -> int:
        """Where the first generated token stands."""
        return self.prompts.layout.length - self.ending.room

    def forward(
        self, tokens: Int[Array, " R"], slot: Int[Array, ""], cache: Cache, capture: Capture
    ) -> tuple[Float[Array, "R V"], Cache, dict[str, Array]]:
        """The pass over one token a row; see ``jaxmllm.decoding.cache.step``."""
        return step(self.module, tokens, slot, self.prompts.layout, self.edits, cache, capture)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoded:
    """What was decoded.

    Attributes:
      steps ``[]``: tokens of the longest answer.
      tokens ``[B, room]``, log_probabilities ``[B, room]``: padding behind an answer's end.
      lengths ``[B]``, stopped ``[B]``: as in ``Generated``.
      cache: keys and values, those of generated tokens included.
      passes ``[]``: passes over single tokens that were made, in rows an example.
      recorded: site -> ``[room, ...]``, what was captured of the position that predicted each token.
    """

    steps: Leaf
    tokens: Leaf
    log_probabilities: Leaf
    lengths: Leaf
    stopped: Leaf
    cache: Cache
    passes: Leaf
    recorded: dict[str, Leaf]


@runtime_checkable
class Rule(Protocol):
    """How tokens follow from what the model says."""

    @property
    def rows(self) -> int:
        """Rows of the prompts that an example has; the first of them are all examples' own."""
        ...

    @property
    def capture(self) -> Capture:
        """What it needs of every pass, that over the prompts included."""
        ...

    def decode(self, decoding: Decoding) -> Decoded:
        """Decodes a batch, within a compiled program."""
        ...


@runtime_checkable
class Score(Protocol):
    """What tokens are chosen by, where it is not the model's logits."""

    @property
    def rows(self) -> int:
        """Views of an example, each a row of its own; the first is the example itself."""
        ...

    @property
    def capture(self) -> Capture:
        """The sites it looks at."""
        ...

    def __call__(
        self, module: Any, logits: Float[Array, "rows B V"], captured: dict[str, Array], seen: Bool[Array, "B V"]
    ) -> Float[Array, "B V"]:
        """Scores of the next token, which take the place of logits.

        Args:
          module: of the family.
          logits: of every view.
          captured: the sites, for R = rows x B rows.
          seen: tokens that the prompt or the answer has already.
        """
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OneByOne:
    """The most probable token, or one that is drawn, step by step until every example has stopped.

    Attributes:
      sampling: how tokens are drawn; ``None`` takes the best.
      score: what they are chosen by; ``None`` for the model's logits.
      record: sites to keep of every position that predicts a token.
    """

    sampling: Sampling | None = None
    score: Score | None = None
    record: Capture = dataclasses.field(default=Capture(), metadata={"static": True})

    @property
    def rows(self) -> int:
        return 1 if self.score is None else self.score.rows

    @property
    def capture(self) -> Capture:
        return self.record if self.score is None else self.record.with_also(self.score.capture)

    def decode(self, decoding: Decoding) -> Decoded:
        """See ``Rule``; all examples take their tokens together."""
        prompts, ending = decoding.prompts, decoding.ending
        batch = len(prompts.logits) // self.rows
        examples = jnp.arange(batch)

        def take(state: Decoded, logits: Array, cache: Cache, captured: dict[str, Array], seen: Array) -> Decoded:
            views = logits.reshape(self.rows, batch, -1)
            scores = views[0] if self.score is None else self.score(decoding.module, views, captured, seen)
            token = choose(scores, decoding.keys, state.steps, self.sampling)
            log_probability = jax.nn.log_softmax(views[0], axis=-1)[examples, token]
            going = ~state.stopped
            return Decoded(
                steps=state.steps + 1,
                tokens=state.tokens.at[:, state.steps].set(jnp.where(going, token, ending.pad_token)),
                log_probabilities=state.log_probabilities.at[:, state.steps].set(
                    jnp.where(going, log_probability, 0.0)
                ),
                lengths=state.lengths + going,
                stopped=state.stopped | ending.stops(token),
                cache=cache,
                passes=state.passes + self.rows,
                recorded={name: values.at[state.steps].set(captured[name]) for name, values in state.recorded.items()},
            )

        def unfinished(state: tuple[Decoded, Array]) -> Array:
            return (state[0].steps < ending.limit) & ~state[0].stopped.all()

        def next_token(state: tuple[Decoded, Array]) -> tuple[Decoded, Array]:
            done, seen = state
            token = done.tokens[:, done.steps - 1]
            seen = seen.at[examples, token].set(True)
            rows = jnp.tile(token, self.rows)
            slot = decoding.first_slot + done.steps - 1
            return take(done, *decoding.forward(rows, slot, done.cache, self.capture), seen), seen

        begin = Decoded(
            steps=jnp.int32(0),
            tokens=jnp.full((batch, ending.room), ending.pad_token, jnp.int32),
            log_probabilities=jnp.zeros((batch, ending.room), jnp.float32),
            lengths=jnp.zeros(batch, jnp.int32),
            stopped=jnp.zeros(batch, bool),
            cache=decoding.cache,
            passes=jnp.int32(-self.rows),  # the first token comes with the pass over the prompts
            recorded={
                site.name: jnp.zeros((ending.room, *prompts.captured[site.name].shape), jnp.float32)
                for site in self.record.sites
            },
        )
        seen = self.seen_in_prompts(decoding, batch)
        first = take(begin, prompts.logits, decoding.cache, prompts.captured, seen)
        return jax.lax.while_loop(unfinished, next_token, (first, seen))[0]

    def seen_in_prompts(self, decoding: Decoding, batch: int) -> Bool[Array, "B V"]:
        """Tokens of each prompt; of no width where no score looks at them."""
        prompts = decoding.prompts
        if self.score is None:
            return jnp.zeros((batch, 0), bool)
        valid = prompts.layout.valid[:batch, : prompts.ids.shape[1]]
        blank = jnp.zeros((batch, prompts.logits.shape[-1]), bool)
        return blank.at[jnp.arange(batch)[:, None], prompts.ids[:batch]].max(valid)
