"""From a file that ``prune`` wrote to the plain and the pruned model, and inputs for both."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from chanprune_ext.analysis.stand_ins import substitute
from chanprune_ext.checkpoint import load, load_weights, read_description
from chanprune_ext.cli.example_inputs import example_inputs
from chanprune_ext.cli.loading import place
from chanprune_ext.cli.model_spec import build_model, parse_arguments
from chanprune_ext.errors import CheckpointError, InvalidArgumentError
from chanprune_ext.plan import plans_of
from chanprune_ext.plan_inputs import inputs_from

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import nn

__all__ = ["SavedModel", "built_from", "names_plain_model", "open_saved"]


@dataclass(frozen=True)
class SavedModel:
    """A pruned model, the plain one it was rebuilt from, and what they take.

    Attributes:
        plain: The original architecture, with the original's weights where those were given.
        pruned: What the file holds.
        inputs: Example inputs, of random numbers where they are floats.
        spec: What names the plain model.
    """

    plain: nn.Module
    pruned: nn.Module
    inputs: Any
    spec: str


def open_saved(
    file: Path,
    spec: str | None,
    arguments: Sequence[str] | None,
    weights: Path | None,
    shapes: Sequence[str] | None,
    device: str,
    option: str = "--model",
) -> SavedModel:
    """Reads a pruned model.

    Args:
        file: What ``prune`` wrote.
        spec: The plain model; None for the one the file names.
        arguments: ``name=value`` pairs for its constructor.
        weights: The original's weights.
        shapes: Shapes of the inputs, as ``--input`` takes them; None for those of the plan.
        device: As ``--device`` takes it.
        option: What the command calls ``spec``.

    Raises:
        ChanpruneError: The file is damaged or foreign, or belongs to another model.
    """
    target = place(device)
    built = _read_built_from(file)
    given = parse_arguments(arguments or ())
    if spec is None:
        spec, given = built.get("model"), {**built.get("arguments", {}), **given}
    elif spec == built.get("model"):
        given = {**built.get("arguments", {}), **given}
    if spec is None:
        raise InvalidArgumentError(
            f"{option}: needed, since {file} does not say what it was pruned from; give the plain "
            "model, like torchvision:resnet50"
        )
    plain = build_model(spec, given)
    if weights is not None:
        load_weights(plain, weights)
    pruned = load(file, plain)
    plans = plans_of(pruned)
    if shapes or not plans:
        inputs = example_inputs(spec, plain, shapes or ())
    else:
        inputs = inputs_from(plans[0].inputs)
    plain, pruned = plain.to(target).eval(), pruned.to(target).eval()
    return SavedModel(plain, pruned, _on(inputs, target, _dtype_of(pruned)), spec)


def built_from(spec: str, arguments: Sequence[str] | None) -> dict[str, Any]:
    """What a saved file says of the plain model, for :func:`open_saved` to read again."""
    return {"model": spec, "arguments": parse_arguments(arguments or ())}


def names_plain_model(file: Path) -> bool:
    """Whether a file says what it was pruned from."""
    return "model" in _read_built_from(file)


def _read_built_from(file: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(read_description(file).get("built_from", "{}"))
    except ValueError as error:
        raise CheckpointError(f"{file}: its description is damaged: {error}") from error
    return found


def _dtype_of(model: nn.Module) -> torch.dtype | None:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), None)


def _on(inputs: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    generator = torch.Generator().manual_seed(0)

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point():
            values = torch.randn(tensor.shape, generator=generator)
            return values.to(device, dtype or tensor.dtype)
        return tensor.to(device)

    return substitute(inputs, moved)
