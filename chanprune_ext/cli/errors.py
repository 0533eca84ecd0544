"""What a user sees of an error, one message and exit code 2, and of a warning: one line."""

from __future__ import annotations

import contextlib
import logging
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
            with _warnings_as_lines(), _torch_silent():
                return super().invoke(ctx)
        except ChanpruneError as error:
            message = Text.assemble(("error: ", "bold red"), (str(error), "red"))
            plain_console(stderr=True).print(message, soft_wrap=True)
            raise typer.Exit(_EXIT_CODE) from error


@contextlib.contextmanager
def _torch_silent() -> Iterator[None]:
    """Keeps torch from logging, traceback and all, what a forward on fake tensors raises.

    The analysis catches that, and tries on or tells it in its message.
    """
    log = logging.getLogger("torch._subclasses.fake_tensor")
    usual = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(usual)


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
