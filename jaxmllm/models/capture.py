"""What a forward pass keeps: named sites, with the reduction that is applied before anything is stored.

Sites carry TransformerLens's names. A capture is static (hashable): it decides what is compiled. Attention is captured
for the rows asked for, in float32, whatever kernel does the work, so memory grows with R x S and never with S x S.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxmllm.errors import InputError
from jaxmllm.models.layout import Layout

RESIDUAL_SITES = ("resid_pre", "attn_in", "attn_out", "resid_mid", "mlp_in", "mlp_out", "resid_post")
ATTENTION = "attn_probs"
EARLY_LOGITS = "early_logits"
SITES = (*RESIDUAL_SITES, ATTENTION, EARLY_LOGITS)

Rows = Literal["last", "answer", "all"] | tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Site:
    """One thing to keep, at every decoder layer.

    Attributes:
      name: one of ``SITES``.
      rows: the sequence positions (for attention: the queries) to keep: ``last`` (the last prompt token), ``answer``
        (the positions that predict an answer's tokens), ``all``, or indices into the padded sequence.
      keys: for attention: ``image`` keeps the image tokens in sequence order (padded with zeros where examples have
        unlike numbers of them), ``all`` keeps every position.
      heads: for attention: ``mean`` or ``max`` over the heads, or ``each``.
    """

    name: str
    rows: Rows = "last"
    keys: Literal["image", "all"] = "image"
    heads: Literal["mean", "max", "each"] = "mean"

    def __post_init__(self) -> None:
        if self.name not in SITES:
            raise InputError(f"unknown site {self.name!r}; expected one of {', '.join(SITES)}")
        if not isinstance(self.rows, str):
            object.__setattr__(self, "rows", tuple(int(row) for row in self.rows))
        elif self.rows not in ("last", "answer", "all"):
            raise InputError(f"unknown rows {self.rows!r}; expected 'last', 'answer', 'all' or positions")
        if self.keys not in ("image", "all"):
            raise InputError(f"unknown keys {self.keys!r}; expected 'image' or 'all'")
        if self.heads not in ("mean", "max", "each"):
            raise InputError(f"unknown heads {self.heads!r}; expected 'mean', 'max' or 'each'")


@dataclasses.dataclass(frozen=True)
class Capture:
    """The sites a forward pass keeps; captures are joined with ``|``.

    ``Output.captured`` maps each site's name to an array with a leading layer axis:

    ==================  =====================================================================
    site                shape
    ==================  =====================================================================
    ``attn_probs``      ``[L, B, R, T]`` (mean or max over heads) or ``[L, B, H, R, T]``, float32
    ``early_logits``    ``[L, B, R, V]``, float32: final norm and head applied after each layer
    all others          ``[L, B, R, D]``
    ==================  =====================================================================
    """

    sites: tuple[Site, ...] = ()

    def __post_init__(self) -> None:
        names = [site.name for site in self.sites]
        if len(set(names)) < len(names):
            raise InputError(f"a site is captured twice: {', '.join(sorted(names))}")

    def __or__(self, other: Capture) -> Capture:
        return Capture(self.sites + other.sites)

    def with_also(self, other: Capture) -> Capture:
        """Both captures, where they may ask for the same.

        Raises:
          InputError: they ask for one site in two ways.
        """
        return self | Capture(tuple(site for site in other.sites if site not in self.sites))

    def site(self, name: str) -> Site | None:
        return next((site for site in self.sites if site.name == name), None)

    @classmethod
    def attention(
        cls,
        rows: Rows = "last",
        keys: Literal["image", "all"] = "image",
        heads: Literal["mean", "max", "each"] = "mean",
    ) -> Capture:
        """Attention weights of the decoder, softmax over *all* positions (the image's share is less than 1)."""
        return cls((Site(ATTENTION, rows, keys, heads),))

    @classmethod
    def residual(cls, site: str = "resid_post", rows: Rows = "all") -> Capture:
        """The residual stream, or a block's input or output: one of ``RESIDUAL_SITES``."""
        if site not in RESIDUAL_SITES:
            raise InputError(f"unknown residual site {site!r}; expected one of {', '.join(RESIDUAL_SITES)}")
        return cls((Site(site, rows),))

    @classmethod
    def early_output(cls, rows: Rows = "last") -> Capture:
        """Logits read from every layer's output through the final norm and the head (the logit lens)."""
        return cls((Site(EARLY_LOGITS, rows),))


def row_index(rows: str | tuple[int, ...], layout: Layout) -> Int[Array, "B R"]:
    """Sequence indices of the rows asked for.

    Raises:
      InputError: an index outside the sequence, or ``answer`` where the inputs hold no answers.
    """
    batch, length = layout.valid.shape
    if rows == "last":
        return layout.last[:, None]
    if rows == "all":
        return jnp.broadcast_to(jnp.arange(length), (batch, length))
    if rows == "answer":
        if layout.answer_positions is None:
            raise InputError("rows 'answer' need inputs with answer_positions (jaxmllm.processing.append_answers)")
        return layout.answer_positions
    if isinstance(rows, str):
        raise InputError(f"unknown rows {rows!r}; expected 'last', 'answer', 'all' or positions")
    outside = [row for row in rows if not 0 <= row < length]
    if outside:
        raise InputError(f"rows {outside} are outside the sequence of {length} positions (0..{length - 1})")
    return jnp.broadcast_to(jnp.asarray(rows), (batch, len(rows)))
