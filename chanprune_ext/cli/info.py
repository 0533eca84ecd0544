"""``chanprune info``: what was built and what this machine uses."""

import json
from typing import Annotated

import typer

from chanprune_ext.cli.tables import facts_table
from chanprune_ext.cli.terminal import plain_console
from chanprune_ext.ops import build_info

__all__ = ["info"]


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Says what was built, for which torch, and which SIMD level was chosen."""
    facts = build_info()
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    modules = {f"module {name}": found for name, found in facts["modules"].items()}
    shown = {
        "chanprune_ext": facts["version"],
        "torch": facts["torch"],
        **modules,
        "CPU operators": "native" if facts["cpu"] else "pure torch",
        "CUDA operators": "native" if facts["cuda"] else "pure torch",
        "SIMD level": facts["simd_level"],
        "compiler": facts["compiler"],
        "oldest torch it runs on": facts["target_torch"],
        "built with torch": facts["built_with_torch"],
        "CUDA toolkit": facts["cuda_toolkit"],
        "CUDA architectures": ", ".join(facts["cuda_archs"] or ()) or None,
    }
    plain_console().print(facts_table({name: value for name, value in shown.items() if value}))
