"""``jaxmllm methods``: what ``evaluate --method`` takes."""

from __future__ import annotations

import dataclasses

from rich.console import Console

from jaxmllm.methods import METHODS


def methods_table() -> list[list[str]]:
    """Every method with its options, their defaults and its presets, header first."""
    rows = [["method", "what it does", "options", "presets"]]
    for name, method in METHODS.items():
        doc = (method.__doc__ or "").strip().split("\n\n")[0]
        options = "\n".join(f"{field.name}={field.default}" for field in dataclasses.fields(method))
        rows.append([name, " ".join(doc.split()), options, ", ".join(method.presets)])
    return rows


def print_methods() -> None:
    """Prints the table, a block a method so that it fits any width."""
    console = Console()
    for name, does, options, presets in methods_table()[1:]:
        console.print(f"[bold]{name}[/bold]  {does}", highlight=False, soft_wrap=True)
        if options:
            console.print(
                f"    options  {', '.join(options.splitlines())}", highlight=False, markup=False, soft_wrap=True
            )
        if presets:
            console.print(f"    presets  {presets}", highlight=False, markup=False, soft_wrap=True)
    console.print(
        "As in: --method vicrop:map=grad-att,layer=14 or --method dola:preset=code", highlight=False, soft_wrap=True
    )
