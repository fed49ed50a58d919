"""A planted bug as data, and how it is planted: while a block runs, with programs that no other block runs."""

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import pytest
from flax import nnx

from jaxmllm.validation import components

Patch = pytest.MonkeyPatch


@dataclasses.dataclass(frozen=True)
class Fault:
    """A bug as a developer would have made it, in the port alone.

    Attributes:
      name: in plain words.
      where: the function, method, leaf or constant that is wrong.
      on: the variant on which it is planted; see ``variants``.
      first: what must depart first: a component, the beginning of its name, or a phase.
      cause: words of a cause that must be among the first that are named.
      plant: patches production code; the model must be loaded afterwards.
      dtype: what both sides compute in.
      also: a further phase that must say so.
    """

    name: str
    where: str
    on: str
    first: str
    cause: str
    plant: Callable[[Patch], None]
    dtype: str = "float32"
    also: str | None = None

    @property
    def phase(self) -> str:
        """The phase in which it must show."""
        return components.phase_of(self.first)


def listed(
    faults: list[Fault],
    where: str,
    on: str,
    first: str,
    cause: str,
    dtype: str = "float32",
    also: str | None = None,
) -> Callable[[Callable[[Patch], None]], Callable[[Patch], None]]:
    """Adds what a function plants to a list, under the function's name."""

    def add(plant: Callable[[Patch], None]) -> Callable[[Patch], None]:
        name = plant.__name__.strip("_").replace("_", " ")
        faults.append(Fault(name, where, on, first, cause, plant, dtype, also))
        return plant

    return add


@contextlib.contextmanager
def planted(fault: Fault) -> Iterator[None]:
    """The bug is there within the block. Programs compiled without it are dropped before, those with it afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        fault.plant(patch)
        jax.clear_caches()
        try:
            yield
        finally:
            jax.clear_caches()


def around(patch: Patch, owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Puts ``wrapper(original, *arguments)`` in the place of a function or method."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*arguments: Any, **named: Any) -> Any:
        return wrapper(original, *arguments, **named)

    patch.setattr(owner, name, wrapped)


def wherever(patch: Patch, function: Callable[..., Any], wrapper: Callable[..., Any]) -> None:
    """``around`` under every name that a module of the package has for a function."""
    found = [
        (module, name)
        for path, module in list(sys.modules.items())
        if path.partition(".")[0] == "jaxmllm"
        for name, value in list(vars(module).items())
        if value is function
    ]
    for module, name in found:
        around(patch, module, name, wrapper)


def become(module: nnx.Module, kind: type) -> None:
    """Makes a module one of a subclass: the same parameters, other arithmetic."""
    object.__setattr__(module, "__class__", kind)


def recast(patch: Patch, owner: type, part: str, kind: type) -> None:
    """A part of every module of a class computes as ``kind`` does."""

    def init(original: Callable[..., None], self: Any, *arguments: Any, **named: Any) -> None:
        original(self, *arguments, **named)
        become(getattr(self, part), kind)

    around(patch, owner, "__init__", init)


class Biasless(nnx.Linear):
    """A linear map whose bias was forgotten."""

    def __call__(self, inputs, out_sharding=None):
        inputs, kernel = self.promote_dtype((inputs, self.kernel[...]), dtype=self.dtype)
        return inputs @ kernel


class NoNorm(nnx.LayerNorm):
    """A layer norm that was forgotten."""

    def __call__(self, x, *, mask=None):
        return x
