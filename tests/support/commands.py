"""Commands of jaxmllm, run in the process of the tests."""

import sys

import pytest

from jaxmllm import cli


def run(monkeypatch, *args) -> int:
    """The exit code of a command."""
    monkeypatch.setattr(sys, "argv", ["jaxmllm", *map(str, args)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
        raise SystemExit(0)
    return stop.value.code or 0
