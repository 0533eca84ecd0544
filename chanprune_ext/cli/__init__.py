"""The ``chanprune`` command. One file per sub-command; this one puts them together."""

# Typer reads annotations at run time, so the files of this package do not postpone them.

from typing import Annotated

import typer

from chanprune_ext.cli.bench import bench
from chanprune_ext.cli.demo import demo
from chanprune_ext.cli.errors import ErrorReportingGroup
from chanprune_ext.cli.evaluate import evaluate
from chanprune_ext.cli.export import export
from chanprune_ext.cli.info import info
from chanprune_ext.cli.inspect import inspect
from chanprune_ext.cli.prune import prune
from chanprune_ext.cli.recover import recover
from chanprune_ext.cli.report import report
from chanprune_ext.cli.reproduce import reproduce
from chanprune_ext.cli.sensitivity import sensitivity
from chanprune_ext.cli.verify import verify

__all__ = ["app"]

app = typer.Typer(
    cls=ErrorReportingGroup,
    help="Makes trained PyTorch networks smaller by removing channels, and gives accuracy back.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def main(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error (before the command).")
    ] = False,
) -> None:
    """Makes trained PyTorch networks smaller by removing channels, and gives accuracy back."""


COMMANDS = (
    demo,
    reproduce,
    prune,
    sensitivity,
    recover,
    evaluate,
    inspect,
    bench,
    export,
    verify,
    report,
    info,
)
for command in COMMANDS:
    app.command()(command)
