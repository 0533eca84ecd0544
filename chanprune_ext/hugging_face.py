"""A pruned transformers model as a plain folder that ``from_pretrained`` reads.

Where a plan has left all layers alike, there is a configuration that builds the narrow model
(``narrow_configs.py`` looks for it). Where there is none (layers of different widths, scales that
belong to the old width), :func:`chanprune_ext.save` keeps the model together with its plan instead.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from chanprune_ext.analysis.calls import run_model, steady_calls, tensors_in
from chanprune_ext.errors import ExportError, OutputError
from chanprune_ext.module_modes import without_cache
from chanprune_ext.module_tree import plain_module
from chanprune_ext.narrow_configs import narrow_configs

if TYPE_CHECKING:
    import os

    from torch import Tensor, nn

__all__ = ["narrow_config", "save_pretrained"]

_TOLERANCE = 1e-5


def save_pretrained(model: nn.Module, folder: str | os.PathLike[str], example_inputs: Any) -> None:
    """Writes a pruned transformers model so that ``from_pretrained(folder)`` reads it.

    The folder is written only after a model built from the narrow configuration alone has computed
    what ``model`` computes.

    Args:
        model: A pruned ``transformers.PreTrainedModel``, also one inside DataParallel or
            torch.compile.
        folder: Where ``config.json`` and ``model.safetensors`` go.
        example_inputs: Inputs with values, to compare the two on.

    Raises:
        InvalidArgumentError: It is no transformers model, or was not pruned.
        ExportError: No configuration builds it; the message says what is left.
        OutputError: The folder can't be written.
    """
    wide: Any = plain_module(model)
    differences = []
    for config in narrow_configs(wide):
        rebuilt = type(wide)(config).to(wide.device, wide.dtype)
        rebuilt.load_state_dict(wide.state_dict())
        differences.append(_difference(wide, rebuilt, example_inputs))
        if differences[-1] <= _TOLERANCE:
            break
    else:
        raise ExportError(
            f"a model built from a narrow configuration computes something else (relative "
            f"difference {min(differences):.1e}): a scale in it follows a width that was pruned, "
            f"of heads or of the residual stream; leave 'head_dim' or 'residual' out of kinds, or "
            f"use chanprune_ext.save"
        )
    try:
        rebuilt.save_pretrained(folder)
    except OSError as error:
        raise OutputError(
            f"{folder}: can't be written ({error}); check that it is a folder or can be made one, "
            "may be written to and has room"
        ) from error


def narrow_config(model: nn.Module) -> Any:
    """The configuration that builds a pruned transformers model, every tensor of its shape.

    Raises:
        InvalidArgumentError: It is no transformers model, or was not pruned.
        ExportError: There is none.
    """
    return next(narrow_configs(plain_module(model)))


def _difference(wide: nn.Module, rebuilt: nn.Module, inputs: Any) -> float:
    """Relative difference of outputs; inf where the rebuilt model does not run on the inputs."""
    expected = _outputs(wide, inputs)
    try:
        found = _outputs(rebuilt, inputs)
    except Exception:  # noqa: BLE001 - numbers that fit all shapes may still contradict each other
        return math.inf
    worst = 0.0
    for a, b in zip(expected, found, strict=True):
        scale = a.abs().max().clamp(min=1e-30)
        worst = max(worst, float((a - b).abs().max() / scale))
    return worst


def _outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    with steady_calls(model), without_cache(model):
        return tensors_in(run_model(model, inputs))
