"""``chanprune export``: a pruned model for other programs."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from chanprune_ext.atomic_files import check_writable
from chanprune_ext.cli.options import (
    Device,
    InputShapes,
    ModelArguments,
    PlainModel,
    SavedFile,
)
from chanprune_ext.cli.saved_model import open_saved
from chanprune_ext.cli.tables import facts_table
from chanprune_ext.cli.terminal import plain_console
from chanprune_ext.export import export as write
from chanprune_ext.export import format_of
from chanprune_ext.quantities import format_bytes

__all__ = ["export"]


class Format(str, Enum):
    """Formats that other programs run."""

    ONNX = "onnx"
    TORCH_EXPORT = "torch-export"
    TORCHSCRIPT = "torchscript"


def export(
    file: SavedFile,
    out: Annotated[
        Path,
        typer.Option(
            help="Where it goes: .onnx, .pt2 or .pt tells the format.", show_default=False
        ),
    ],
    model: PlainModel = None,
    model_arg: ModelArguments = None,
    shapes: InputShapes = None,
    format_: Annotated[
        Format | None,
        typer.Option("--format", help="Format, where the name does not tell.", show_default=False),
    ] = None,
    fixed_batch: Annotated[
        bool, typer.Option("--fixed-batch", help="Keep the batch size of the input.")
    ] = False,
    device: Device = "cpu",
) -> None:
    """Writes a pruned model as ONNX, torch.export program or TorchScript, and checks the file."""
    kind = format_of(out) if format_ is None else format_.value
    check_writable(out)
    saved = open_saved(file, model, model_arg, None, shapes, device)
    found = write(saved.pruned, saved.inputs, out, format=kind, dynamic_batch=not fixed_batch)
    console = plain_console()
    facts = {
        "file": found.path,
        "format": found.format,
        "size": format_bytes(found.bytes),
        "batch": "any" if found.dynamic_batch else "fixed",
        "difference to torch": f"{found.error:.1e}",
    }
    console.print(facts_table(facts))
    if found.note:
        console.print(f"note: {found.note}", style="yellow", soft_wrap=True)
