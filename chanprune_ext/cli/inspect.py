"""``chanprune inspect``: what may be pruned in a model, and what keeps the rest."""

import json
import time
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from chanprune_ext.atomic_files import check_writable, write_text
from chanprune_ext.cli.example_inputs import example_inputs
from chanprune_ext.cli.model_spec import build_model, parse_arguments
from chanprune_ext.cli.options import JsonOut, ModelArguments, ModelSpec
from chanprune_ext.cli.terminal import plain_console
from chanprune_ext.errors import AnalysisError
from chanprune_ext.explanation import cause
from chanprune_ext.inspection import Inspection, inspect_model

__all__ = ["inspect"]

LARGE = 1_000_000_000  # parameters from which a model without weights is not built with them


def inspect(
    model: ModelSpec,
    model_arg: ModelArguments = None,
    shapes: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            metavar="SHAPE[:DTYPE]",
            help="Shape of an input, like 1x3x224x224 or 1x16:int64; once for each input. Models "
            "named by a package take what is usual.",
            show_default=False,
        ),
    ] = None,
    layer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Tell all about this module or parameter instead; may be repeated.",
            show_default=False,
        ),
    ] = None,
    json_out: JsonOut = None,
) -> None:
    """Shows which channels of a model go together, and what freezes the others."""
    console = plain_console()
    if json_out is not None:
        check_writable(json_out)
    network = build_model(model, parse_arguments(model_arg or ()), on_meta=True)
    inputs = example_inputs(model, network, shapes or ())
    start = time.perf_counter()
    try:
        found = inspect_model(network, inputs)
    except AnalysisError:
        size = sum(p.numel() for p in network.parameters() if p.is_meta)
        if not 0 < size < LARGE:
            raise
        # Some forwards look at values, which the meta device does not have.
        network = build_model(model, parse_arguments(model_arg or ()))
        inputs = example_inputs(model, network, shapes or ())
        found = inspect_model(network, inputs)
    seconds = time.perf_counter() - start
    if layer:
        for name in layer:
            console.print(str(found.explain(name)), highlight=False, soft_wrap=True)
    else:
        console.print(group_table(found, model))
        if found.frozen:
            console.print(frozen_table(found))
        free = found.channels - found.stuck
        console.print(
            f"{len(found.groups)} groups; {free:,} of {found.channels:,} output channels may go; "
            f"analysed in {seconds:.2f} s on {found.substrate} tensors",
            soft_wrap=True,
        )
    if json_out is not None:
        text = json.dumps({"model": model, **found.to_dict()}, indent=1)
        write_text(json_out, text)
        console.print(f"json: {json_out}", soft_wrap=True)


def group_table(found: Inspection, title: str) -> Table:
    """One row a group: who makes its channels, who reads them, how many there are."""
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    table.add_column("made by", overflow="fold")
    table.add_column("read by", overflow="fold")
    table.add_column("width", justify="right", no_wrap=True)
    table.add_column("units", justify="right", no_wrap=True)
    for group, units in zip(found.groups, found.couplings.units, strict=True):
        table.add_row(
            shortened(group.producers),
            shortened(group.consumers),
            str(group.width_before),
            str(units),
        )
    return table


def frozen_table(found: Inspection) -> Table:
    """One row a reason: whose channels it keeps, and how many."""
    table = Table(title="must stay", title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    table.add_column("channels of", overflow="fold")
    table.add_column("how many", justify="right", no_wrap=True)
    table.add_column("because", overflow="fold")
    by_reason: dict[str, dict[str, int]] = {}
    for frozen in found.frozen:
        kept = by_reason.setdefault(cause(frozen), {})
        kept[frozen.entry] = kept.get(frozen.entry, 0) + frozen.channels
    for reason, kept in by_reason.items():
        table.add_row(shortened(tuple(kept)), str(sum(kept.values())), reason)
    return table


def shortened(names: tuple[str, ...]) -> str:
    """The first names, one a line, and how many more there are."""
    more = [f"and {len(names) - 3} more"] if len(names) > 4 else []
    return "\n".join([*names[: 3 if more else 4], *more]) or "-"
