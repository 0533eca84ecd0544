"""Where the commands print."""

from __future__ import annotations

import sys

from rich.console import Console

__all__ = ["plain_console", "print_what_can_be_printed"]


def plain_console(*, stderr: bool = False) -> Console:
    """A console that shows paths and names with brackets as they are, and not as markup."""
    return Console(stderr=stderr, markup=False)


def print_what_can_be_printed() -> None:
    """Lets a terminal that knows few characters show ``?`` for others, instead of an error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
