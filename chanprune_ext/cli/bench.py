"""``chanprune bench``: a pruned model measured against its original."""

import json
from pathlib import Path
from typing import Annotated

import torch
import typer

from chanprune_ext.atomic_files import check_writable, write_text
from chanprune_ext.bench import BACKENDS
from chanprune_ext.bench import bench as measure
from chanprune_ext.cli.bench_tables import module_table, row_table
from chanprune_ext.cli.options import Device, InputShapes, ModelArguments, SavedFile
from chanprune_ext.cli.run_printing import announcement
from chanprune_ext.cli.saved_model import open_saved
from chanprune_ext.cli.terminal import plain_console
from chanprune_ext.report import environment

__all__ = ["bench"]


def bench(
    file: SavedFile,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The original: resnet56, torchvision:<name>, timm:<name>, hf:<type>, or "
            "<module>:<callable>. Default: what FILE was pruned from, where it says so.",
            show_default=False,
        ),
    ] = None,
    model_arg: ModelArguments = None,
    shapes: InputShapes = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(help="Batch size; may be repeated.", show_default="1, 16"),
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(
            help=f"One of {', '.join(BACKENDS)}; may be repeated.",
            show_default="all",
        ),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="Time to measure each row.")] = 10.0,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads to use.", show_default=False)
    ] = None,
    channels_last: Annotated[
        bool, typer.Option("--channels-last", help="Store convolutions with channels last.")
    ] = False,
    layers: Annotated[int, typer.Option(min=0, help="Modules to show, slowest first.")] = 12,
    json_out: Annotated[
        Path | None, typer.Option("--json", help="Also write all, as JSON.", show_default=False)
    ] = None,
    device: Device = "auto",
) -> None:
    """Measures latency, throughput and memory against the original, and where the time goes."""
    console = plain_console()
    if json_out is not None:
        check_writable(json_out)
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        saved = open_saved(file, against, model_arg, None, shapes, device, option="--against")
        found = measure(
            saved.plain,
            saved.pruned,
            saved.inputs,
            batch_sizes=batch or (1, 16),
            backends=backend or BACKENDS,
            seconds=seconds,
            channels_last=channels_last,
            say=lambda line: console.print(announcement(line)),
        )
    finally:
        torch.set_num_threads(before)
    console.print(row_table(found, f"{file.name} against {saved.spec}"))
    plural = "" if found.threads == 1 else "s"
    layout = ", channels last" if found.channels_last else ""
    console.print(
        f"{found.device}, {found.threads} thread{plural}{layout}; medians of rounds in turns, "
        "memory is weights and the activations' peak",
        style="dim",
    )
    for name, reason in found.skipped.items():
        console.print(f"{name}: left out: {reason}", style="yellow", soft_wrap=True)
    if layers:
        console.print(module_table(found, layers))
    for hint in found.hints:
        console.print(f"hint: {hint}", style="green", soft_wrap=True)
    if json_out is not None:
        facts = {"model": saved.spec, "file": file.name, "environment": environment()}
        write_text(json_out, json.dumps({**facts, **found.to_dict()}, indent=1) + "\n")
        console.print(f"json: {json_out}", soft_wrap=True)
