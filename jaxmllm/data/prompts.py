"""What a benchmark's questions are asked in: templates, which are data (``prompts.toml``), and how they are filled."""

from __future__ import annotations

import re
import string
import tomllib
from pathlib import Path
from typing import Any

from jaxmllm.data.benchmarks.base import Example
from jaxmllm.errors import InputError

PROMPTS = Path(__file__).with_name("prompts.toml")
FIELDS = ("question", "hint", "options", "ocr", "image")
_ONE_FIELD = re.compile(r"\{(\w+)\}")


def prompt_template(
    benchmark: str, family: str, override: str | Path | None = None, conversation: str | None = None
) -> str:
    """The template of a benchmark's prompts for a family of models.

    Args:
      benchmark: its name.
      family: the ``model_type`` of a checkpoint.
      override: a template to use in its place, with ``{question}`` in it; or a TOML file in the form of
        ``prompts.toml``, whose entries go before those that come with the package.
      conversation: the name of a whole conversation to put the template into, in place of the checkpoint's own chat
        template.

    Returns:
      The template, for :func:`fill_prompt`.

    Raises:
      InputError: no such benchmark, conversation or file; a file of another form; a template that cannot be filled.
    """
    tables = [_read_prompts(PROMPTS)]
    template = None
    if override is not None and "{question}" in str(override):
        template = str(override)
    elif override is not None:
        tables.insert(0, _read_prompts(Path(override)))
    if template is None:
        template = _lookup(tables, "templates", benchmark, family)
    if template is None:
        raise InputError(f"no prompt for the benchmark {benchmark!r} and the family {family!r}; give a template")
    if conversation is not None:
        template = _put_into(conversation, template, tables)
    check_template(template)
    return template


def check_template(template: str) -> None:
    """Refuses a template that cannot be filled.

    Raises:
      InputError: braces that are not paired, a field that there is not, or no ``{question}``.
    """
    fields = [field for line in template.split("\n") for _, field in _pieces(line, template)]
    unknown = next((field for field in fields if field is not None and field not in FIELDS), None)
    if unknown is not None:
        raise InputError(
            f"the prompt template {template!r} has the field {{{unknown}}}; there are "
            f"{', '.join(f'{{{field}}}' for field in FIELDS)}, and braces of the text itself are doubled"
        )
    if "question" not in fields:
        raise InputError(f"the prompt template {template!r} has no {{question}}")


def fill_prompt(template: str, example: Example, image_token: str) -> str:
    """A question's prompt; what the example says is put in as it is, braces included.

    Args:
      template: of :func:`prompt_template`.
      example: the question; a field that it has not is empty.
      image_token: what a processor takes for ``{image}``.

    Raises:
      InputError: as :func:`check_template`.
    """
    check_template(template)
    values = {**dict.fromkeys(FIELDS, ""), **example.fields, "question": example.text, "image": image_token}
    lines = []
    for line in template.split("\n"):
        only = _ONE_FIELD.fullmatch(line)
        if only is None or values[only[1]]:
            pieces = _pieces(line, template)
            lines.append("".join(text + ("" if field is None else values[field]) for text, field in pieces))
    return "\n".join(lines)


def _pieces(line: str, template: str) -> list[tuple[str, str | None]]:
    """Texts of a line, each with the field that follows it."""
    try:
        parsed = list(string.Formatter().parse(line))
    except ValueError as error:
        raise InputError(f"the prompt template {template!r} has braces that are not paired ({error})") from None
    for _, field, form, conversion in parsed:
        if field is not None and (form or conversion):
            raise InputError(f"the prompt template {template!r} says more than a name in {{{field}...}}")
    return [(text, field) for text, field, _, _ in parsed]


def _put_into(conversation: str, template: str, tables: list[dict[str, Any]]) -> str:
    if "{image}" in template:
        raise InputError(f"the prompt template {template!r} is a whole prompt already; give no conversation with it")
    known = {name: text for table in reversed(tables) for name, text in table.get("conversations", {}).items()}
    if conversation not in known:
        raise InputError(f"no conversation is called {conversation!r}; there are {', '.join(known)}")
    whole = known[conversation]
    if "{image}" not in whole or "{prompt}" not in whole:
        raise InputError(f"the conversation {conversation!r} is {whole!r}; expected {{image}} and {{prompt}} in it")
    return str(whole.replace("{prompt}", template))


def _lookup(tables: list[dict[str, Any]], kind: str, benchmark: str, family: str) -> str | None:
    """The first table's template for the family, or its default; then the next table's."""
    for table in tables:
        templates = table.get(kind, {}).get(benchmark, {})
        if family in templates or "default" in templates:
            return str(templates.get(family, templates.get("default")))
    return None


def _read_prompts(path: Path) -> dict[str, Any]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; expected a TOML file, or a template with {{question}} in it") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as TOML ({error})") from error
    unknown = sorted(set(table) - {"templates", "conversations"})
    if unknown:
        raise InputError(
            f"{path}: holds {', '.join(unknown)}; expected tables [templates.BENCHMARK] and [conversations]"
        )
    for name, templates in {**table.get("templates", {}), "conversations": table.get("conversations", {})}.items():
        if not isinstance(templates, dict) or not all(isinstance(text, str) for text in templates.values()):
            raise InputError(f"{path}: {name} is {templates!r}; expected texts by names")
    return table
