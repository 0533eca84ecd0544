"""From command-line arguments to models and devices."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from chanprune_ext.checkpoint import FORMAT, load, load_weights, read_description
from chanprune_ext.cli.model_spec import build_model, parse_arguments
from chanprune_ext.errors import CheckpointError, InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import nn

__all__ = ["load_model", "model_arguments", "place", "read_built_from"]


def place(device: str) -> torch.device:
    """The device a ``--device`` argument names; ``auto`` is a GPU where there is one.

    Raises:
        InvalidArgumentError: No such device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        # Allocating is the only check that covers devices of every kind.
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InvalidArgumentError(
            f"--device: {device!r} cannot be used here ({reason}); try 'cpu'"
        ) from error


def model_arguments(spec: str, pairs: Sequence[str] | None, weights: Path | None) -> dict[str, Any]:
    """Arguments of a model's constructor: those given, and what its saved weights say of others.

    Args:
        spec: As :func:`build_model` takes it.
        pairs: ``name=value`` pairs that were given.
        weights: As for :func:`load_model`.

    Raises:
        ChanpruneError: A pair is none, or the file is damaged.
    """
    given = parse_arguments(pairs or ())
    built = {} if weights is None or not is_saved_model(weights) else read_built_from(weights)
    return {**built.get("arguments", {}), **given} if built.get("model") == spec else given


def read_built_from(file: Path) -> dict[str, Any]:
    """What a saved file says of the plain model: ``model`` and ``arguments``, or nothing.

    Raises:
        CheckpointError: It is damaged, or no such file.
    """
    description = read_description(file)
    try:
        found: dict[str, Any] = json.loads(description.get("built_from", "{}"))
    except ValueError as error:
        raise CheckpointError(f"{file}: its description is damaged: {error}") from error
    return found


def load_model(
    spec: str, arguments: Mapping[str, Any], weights: Path | None, device: str
) -> nn.Module:
    """Builds a model and gives it its weights, which may be those of a pruned model.

    Args:
        spec: As :func:`build_model` takes it.
        arguments: Of its constructor, as from :func:`model_arguments`.
        weights: A state dict, or a file written by :func:`chanprune_ext.checkpoint.save`; None
            leaves the fresh weights.
        device: As :func:`place` takes it.

    Raises:
        ChanpruneError: The model cannot be built, or the weights are not its own.
    """
    target = place(device)
    model = build_model(spec, arguments)
    if weights is not None:
        model = load(weights, model) if is_saved_model(weights) else load_weights(model, weights)
    return model.to(target)


def is_saved_model(path: Path) -> bool:
    """Whether a file carries this package's description, and so perhaps a plan."""
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (OSError, SafetensorError):
        # Not a safetensors file, or none at all: reading it as plain weights says what is wrong.
        return False
