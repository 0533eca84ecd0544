"""What a user sees of an error, one message and exit code 2, and of a warning: one line."""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from chanprune_ext.errors import ChanpruneError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["ErrorReportingGroup"]

_EXIT_CODE = 2
_PACKAGE = Path(__file__).parents[1]


class ErrorReportingGroup(TyperGroup):
    """Command group that prints a :class:`ChanpruneError` as a message instead of a traceback.

    Warnings for the lines of this package are printed likewise; those of others as ever. With
    ``--debug`` all pass through, traceback and all. Any other exception is a bug and always passes
    through.
    """

    def invoke(self, ctx: Any) -> Any:
        """Runs the chosen sub-command."""
        if ctx.params.get("debug"):
            return super().invoke(ctx)
        try:
            with _warnings_as_lines():
                return super().invoke(ctx)
        except ChanpruneError as error:
            message = Text.assemble(("error: ", "bold red"), (str(error), "red"))
            Console(stderr=True).print(message, soft_wrap=True)
            raise typer.Exit(_EXIT_CODE) from error


@contextlib.contextmanager
def _warnings_as_lines() -> Iterator[None]:
    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(message: Any, category: Any, filename: str, *where: Any, **more: Any) -> None:
            if _PACKAGE in Path(filename).parents:
                line = Text.assemble(("warning: ", "bold yellow"), (str(message), "yellow"))
                Console(stderr=True).print(line, soft_wrap=True)
            else:
                usual(message, category, filename, *where, **more)

        warnings.showwarning = show
        yield
