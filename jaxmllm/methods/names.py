"""Methods by name, and methods in words: ``vicrop``, ``vicrop:preset=code,map=grad-att``, ``vcd:alpha=1,beta=0.2``."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Sequence
from typing import Any

from jaxmllm.errors import InputError
from jaxmllm.methods.base import Method, Number
from jaxmllm.methods.carve import Carve
from jaxmllm.methods.contrastive import ContrastiveReinput, ReviewMask
from jaxmllm.methods.controls import CentreCrop, EvidenceCrop, RandomCrop, SecondLook
from jaxmllm.methods.dola import Dola
from jaxmllm.methods.knockout import AttentionKnockout
from jaxmllm.methods.opera import Opera
from jaxmllm.methods.vcd import Vcd
from jaxmllm.methods.vicrop import ViCrop

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        Method,
        ContrastiveReinput,
        ReviewMask,
        ViCrop,
        Carve,
        Vcd,
        Dola,
        Opera,
        AttentionKnockout,
        RandomCrop,
        CentreCrop,
        EvidenceCrop,
        SecondLook,
    )
}


def parse_method(spec: str, fusion_layers: Sequence[int] | None = None) -> Method:
    """A method from its name and options.

    Args:
      spec: a name, then ``:`` and options ``name=value`` with commas between. ``preset=NAME`` sets several at once, and
        others go before it. Several numbers are joined by ``+``.
      fusion_layers: for the methods that use them.

    Raises:
      InputError: naming what cannot be read, and what there is.
    """
    name, _, rest = spec.partition(":")
    kind = METHODS.get(name.strip())
    if kind is None:
        raise InputError(f"method {spec!r}: no method {name.strip()!r}; expected one of {', '.join(METHODS)}")
    given: dict[str, str] = {}
    for option in filter(None, (part.strip() for part in rest.split(","))):
        key, equals, value = (part.strip() for part in option.partition("="))
        if not equals or key in given:
            raise InputError(f"method {spec!r}: {option!r} is no option; expected name=value, each name once")
        given[key] = value
    values: dict[str, Any] = {}
    preset = given.pop("preset", None)
    if preset is not None:
        if preset not in kind.presets:
            there = ", ".join(kind.presets) or "none"
            raise InputError(f"method {spec!r}: no preset {preset!r} of {kind.name}; there are {there}")
        values |= kind.presets[preset]
    kinds = options_of(kind)
    for key, value in given.items():
        if key not in kinds:
            there = ", ".join(kinds) or "none"
            raise InputError(f"method {spec!r}: {kind.name} has no option {key!r}; there are {there}")
        values[key] = _read(spec, key, value, kinds[key])
    if fusion_layers is not None and "fusion_layers" in kinds and "fusion_layers" not in values:
        values["fusion_layers"] = tuple(fusion_layers)
    return kind(**values)


def spell(method: Method) -> str:
    """One spelling for methods that do the same: the name, then what differs from its defaults."""
    kinds = options_of(type(method))
    changed = {
        field.name: getattr(method, field.name)
        for field in dataclasses.fields(method)
        if getattr(method, field.name) != field.default
    }
    options = ",".join(f"{key}={_write(value, kinds[key])}" for key, value in changed.items())
    return f"{method.name}:{options}" if options else method.name


def options_of(kind: type[Method]) -> dict[str, Any]:
    """A method's options and their types."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _write(value: Any, kind: Any) -> str:
    if isinstance(value, tuple):
        return "+".join(map(str, value))
    if kind == Number:
        return str(float(value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _read(spec: str, key: str, value: str, kind: Any) -> Any:
    """A value in words as one of the kinds that an option takes."""
    if isinstance(kind, types.UnionType):
        if kind == Number:
            return _read(spec, key, value, float)
        kinds = [one for one in typing.get_args(kind) if one is not type(None)]
        for one in sorted(kinds, key=lambda one: one is str):  # text is what is no number
            try:
                return _read(spec, key, value, one)
            except InputError:
                continue
        raise InputError(f"method {spec!r}: {key} is {value!r}; expected {' or '.join(one.__name__ for one in kinds)}")
    try:
        if kind is bool:
            return {"true": True, "false": False}[value.lower()]
        if typing.get_origin(kind) is Sequence:
            return tuple(int(part) for part in value.split("+") if part)
        return kind(value)
    except (ValueError, KeyError):
        expected = {bool: "true or false", int: "a whole number", float: "a number"}.get(kind, "numbers joined by +")
        raise InputError(f"method {spec!r}: {key} is {value!r}; expected {expected}") from None
