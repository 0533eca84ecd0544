"""From a file that ``prune`` wrote to the plain and the pruned model, and inputs for both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from chanprune_ext.analysis.stand_ins import substitute
from chanprune_ext.checkpoint import load, load_weights
from chanprune_ext.cli.example_inputs import example_inputs
from chanprune_ext.cli.loading import model_arguments, place, read_built_from
from chanprune_ext.cli.model_spec import build_model
from chanprune_ext.errors import InvalidArgumentError
from chanprune_ext.plan import plans_of
from chanprune_ext.plan_inputs import inputs_from

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
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
    built = read_built_from(file)
    spec = spec or built.get("model")
    if spec is None:
        raise InvalidArgumentError(
            f"{option}: needed, since {file} does not say what it was pruned from; give the plain "
            "model, like torchvision:resnet50"
        )
    plain = build_model(spec, model_arguments(spec, arguments, file))
    if weights is not None:
        load_weights(plain, weights)
    pruned = load(file, plain)
    plans = plans_of(pruned)
    if shapes or not plans:
        inputs = example_inputs(spec, plain, shapes or ())
    else:
        inputs = inputs_from(plans[0].inputs)
    for model in (plain, pruned):
        model.to(target)
        model.eval()  # in a line of its own: a model's own train() may return nothing
    return SavedModel(plain, pruned, _on(inputs, target, _dtype_of(pruned)), spec)


def built_from(spec: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What a saved file says of the plain model, for :func:`read_built_from` to read again."""
    return {"model": spec, "arguments": dict(arguments)}


def names_plain_model(file: Path) -> bool:
    """Whether a file says what it was pruned from."""
    return "model" in read_built_from(file)


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
