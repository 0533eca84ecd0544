"""What a user sees when something goes wrong on purpose: one message, exit code 2."""

from __future__ import annotations

from typing import Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from chanprune_ext.errors import ChanpruneError

__all__ = ["ErrorReportingGroup"]

_EXIT_CODE = 2


class ErrorReportingGroup(TyperGroup):
    """Command group that prints a :class:`ChanpruneError` as a message instead of a traceback.

    With ``--debug`` the error passes through, traceback and all. Any other exception is a bug and
    always passes through.
    """

    def invoke(self, ctx: Any) -> Any:
        """Runs the chosen sub-command."""
        try:
            return super().invoke(ctx)
        except ChanpruneError as error:
            if ctx.params.get("debug"):
                raise
            message = Text.assemble(("error: ", "bold red"), (str(error), "red"))
            Console(stderr=True).print(message, soft_wrap=True)
            raise typer.Exit(_EXIT_CODE) from error
