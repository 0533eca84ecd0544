"""What a user sees of an error, one message and exit code 2, and of a warning: one line."""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.text import Text
from typer.core import TyperGroup

from chanprune_ext.cli.terminal import plain_console, print_what_can_be_printed
from chanprune_ext.errors import ChanpruneError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["ErrorReportingGroup"]

_EXIT_CODE = 2
# What messages of the library call arguments that have another name on the command line.
_OPTIONS = {
    "example_inputs": "--input",
    "checkpoint_dir:": "--checkpoints",
    "teacher:": "--teacher-weights",
}
_PACKAGE = Path(__file__).parents[1]


class ErrorReportingGroup(TyperGroup):
    """Command group that prints a :class:`ChanpruneError` as a message instead of a traceback.

    Warnings for the lines of this package are printed likewise; those of others as ever. With
    ``--debug`` all pass through, traceback and all. Any other exception is a bug and always passes
    through.
    """

    def invoke(self, ctx: Any) -> Any:
        """Runs the chosen sub-command."""
        print_what_can_be_printed()
        if ctx.params.get("debug"):
            return super().invoke(ctx)
        try:
            with _warnings_as_lines():
                return super().invoke(ctx)
        except ChanpruneError as error:
            message = Text.assemble(("error: ", "bold red"), (_with_options(str(error)), "red"))
            plain_console(stderr=True).print(message, soft_wrap=True)
            raise typer.Exit(_EXIT_CODE) from error


def _with_options(message: str) -> str:
    """A message of the library, and which options the arguments in it stand for."""
    options = [option for name, option in _OPTIONS.items() if name in message]
    return f"{message.rstrip('.')}; here that is {options[0]}" if options else message


@contextlib.contextmanager
def _warnings_as_lines() -> Iterator[None]:
    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(message: Any, category: Any, filename: str, *where: Any, **more: Any) -> None:
            if _PACKAGE in Path(filename).parents:
                line = Text.assemble(("warning: ", "bold yellow"), (str(message), "yellow"))
                plain_console(stderr=True).print(line, soft_wrap=True)
            else:
                usual(message, category, filename, *where, **more)

        warnings.showwarning = show
        yield
