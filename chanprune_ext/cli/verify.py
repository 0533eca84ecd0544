"""``chanprune verify``: is this file whole, and does it do what it says?"""

import json
from pathlib import Path
from typing import Annotated

import typer

from chanprune_ext.atomic_files import check_writable, write_text
from chanprune_ext.cli.options import Device, InputShapes, ModelArguments, PlainModel, SavedFile
from chanprune_ext.cli.saved_model import names_plain_model, open_saved
from chanprune_ext.cli.tables import check_table
from chanprune_ext.cli.terminal import plain_console
from chanprune_ext.file_checks import Check, check_file, check_model

__all__ = ["verify"]


def verify(
    file: SavedFile,
    model: PlainModel = None,
    model_arg: ModelArguments = None,
    weights: Annotated[
        Path | None,
        typer.Option(help="Weights of the original: compare the file with it.", show_default=False),
    ] = None,
    shapes: InputShapes = None,
    json_out: Annotated[
        Path | None,
        typer.Option("--json", help="Also write the checks, as JSON.", show_default=False),
    ] = None,
    device: Device = "cpu",
) -> None:
    """Checks a saved model: the file alone, and rebuilt where the plain model is known.

    Ends with exit code 1 where a check failed.
    """
    console = plain_console()
    if json_out is not None:
        check_writable(json_out)
    checks = check_file(file)
    whole = all(check.passed is not False for check in checks)
    known = whole and (model is not None or names_plain_model(file))
    if whole and (known or weights is not None or model_arg or shapes):
        saved = open_saved(file, model, model_arg, weights, shapes, device)
        original = weights is not None
        checks += check_model(saved.plain, saved.pruned, saved.inputs, original=original)
    elif whole:
        checks.append(Check("rebuilt", None, "neither rebuilt nor run"))
    console.print(check_table(checks, str(file)))
    if whole and not known:
        console.print(
            "the file does not say what it was pruned from: give --model to rebuild and run it",
            style="yellow",
            soft_wrap=True,
        )
    if json_out is not None:
        write_text(json_out, json.dumps([vars(check) for check in checks], indent=1) + "\n")
        console.print(f"json: {json_out}", soft_wrap=True)
    if any(check.passed is False for check in checks):
        raise typer.Exit(1)
