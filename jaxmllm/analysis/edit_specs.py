"""Edits in words: ``erase:12``, ``blind:3-7``, ``knockout:8-``, ``erase:12+knockout:0-3``.

A term is an edit and its layers: one, a range whose last layer counts, or all from one on. Terms are joined by ``+``.
"""

from __future__ import annotations

import re

from jaxmllm.analysis.edits import compose, from_layer, window
from jaxmllm.analysis.masking import EDIT_MAKERS
from jaxmllm.errors import InputError
from jaxmllm.models.edits import Edits

EXAMPLES = "erase:12, blind:3-7, knockout:8- or erase:12+knockout:0-3"
_LAYERS = re.compile(r"([0-9]+)(-([0-9]*))?")


def parse_edits(spec: str) -> Edits:
    """The edits of a spec, composed.

    Args:
      spec: terms joined by ``+``; each an edit (``erase``, ``blind``, ``knockout``: question to image), a colon, and
        layers counted from 0: ``12``, ``3-7`` (both count) or ``12-`` (to the last).

    Raises:
      InputError: naming the term that cannot be read.
    """
    return compose(
        *(
            EDIT_MAKERS[name](from_layer(first) if last is None else window(first, last + 1))
            for name, first, last in _terms(spec)
        )
    )


def normal_spec(spec: str) -> str:
    """One spelling for specs that differ in spaces, leading zeros or a range of one layer.

    Raises:
      InputError: as ``parse_edits``.
    """
    terms = []
    for name, first, last in _terms(spec):
        ending = "-" if last is None else "" if last == first else f"-{last}"
        terms.append(f"{name}:{first}{ending}")
    return "+".join(terms)


def _terms(spec: str) -> list[tuple[str, int, int | None]]:
    """Edit, first layer and last layer (``None``: the model's last) of every term."""
    terms = []
    for term in spec.split("+"):
        name, colon, layers = (part.strip() for part in term.partition(":"))
        if name not in EDIT_MAKERS:
            raise InputError(
                f"edits {spec!r}: no edit {name!r}; expected one of {', '.join(EDIT_MAKERS)}, as in {EXAMPLES}"
            )
        found = _LAYERS.fullmatch(layers)
        if not colon or found is None:
            raise InputError(f"edits {spec!r}: the layers of {name} are {layers!r}; expected a form such as {EXAMPLES}")
        first = int(found[1])
        last = first if found[2] is None else int(found[3]) if found[3] else None
        if last is not None and last < first:
            raise InputError(f"edits {spec!r}: layers {layers} run backwards; expected {last}-{first}")
        terms.append((name, first, last))
    return terms
