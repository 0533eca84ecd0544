"""The entry of the analysis: check the inputs, trace once, group."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from chanprune_ext.analysis.calls import tensors_in
from chanprune_ext.analysis.grouping import build_analysis
from chanprune_ext.analysis.stand_ins import tensors_of
from chanprune_ext.analysis.trace import trace_model
from chanprune_ext.errors import InvalidArgumentError
from chanprune_ext.module_tree import modules_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from chanprune_ext.analysis.groups import Analysis

__all__ = ["analyse"]


def analyse(
    model: nn.Module, example_inputs: Any, outputs: Callable[[Any], Any] | None = None
) -> Analysis:
    """Find the coupling groups of ``model``.

    Args:
        model: Any eager module; left as it was.
        example_inputs: A tensor, a tuple of positional inputs or a dict of keyword inputs, on the
            model's device, of a batch the model takes.
        outputs: Picks, from what the model returns, what must keep its shape. Default: all of it.

    Raises:
        InvalidArgumentError: The model is scripted, compiled or quantised or has lazy parameters,
            the inputs hold no tensor, model and inputs are on different devices, or ``outputs`` is
            no function or raised.
        AnalysisError: The model's forward raised while tracing.
    """
    if not isinstance(model, nn.Module):
        raise InvalidArgumentError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, (torch.jit.ScriptModule, torch.jit.ScriptFunction)):
        raise InvalidArgumentError(
            "model is a scripted module, whose forward cannot be followed; prune the eager model "
            "and script the result"
        )
    if any(type(module).__name__ == "OptimizedModule" for _, module in modules_of(model)):
        raise InvalidArgumentError(
            "model is compiled, or parts of it are; prune the plain model (torch.compile keeps it "
            "as '_orig_mod') and compile the result"
        )
    _refuse_wrapped(model)
    _refuse_scripted(model)
    _refuse_packed(model)
    if outputs is not None and not callable(outputs):
        raise InvalidArgumentError(
            f"outputs must be a function that picks, from what the model returns, what must keep "
            f"its shape, got {outputs!r}"
        )
    inputs = tensors_in(example_inputs)
    if not inputs:
        raise InvalidArgumentError(
            "example_inputs must hold at least one tensor: give a tensor, a tuple or a dict; got "
            f"{type(example_inputs).__name__}"
        )
    tensors = tensors_of(model)
    for name, tensor in tensors.items():
        if torch.nn.parameter.is_lazy(tensor):
            raise InvalidArgumentError(
                f"model has a lazy parameter '{name}' without a shape; run the model once first"
            )
    devices = {t.device for t in tensors.values() if not t.is_meta}
    for tensor in inputs:
        if len(devices) == 1 and not tensor.is_meta and tensor.device not in devices:
            raise InvalidArgumentError(
                f"example_inputs are on {tensor.device}, the model is on {next(iter(devices))}; "
                f"move one to the other"
            )
    return build_analysis(trace_model(model, example_inputs, outputs))


def _refuse_wrapped(model: nn.Module) -> None:
    """Wrappers that note down what the parameters are cannot follow them."""
    for _, module in modules_of(model):
        kind = type(module).__name__
        if kind in ("DistributedDataParallel", "FullyShardedDataParallel"):
            raise InvalidArgumentError(
                f"model is wrapped in {kind}, or parts of it are, which holds on to its "
                f"parameters and their shapes; prune the plain model ('.module') without "
                f"inplace and wrap the copy"
            )


def _refuse_scripted(model: nn.Module) -> None:
    """Of scripted modules only those can be followed that are all code: no weights, not frozen."""
    for name, module in modules_of(model):
        if isinstance(module, torch.jit.ScriptModule) and (
            "_parameters" not in vars(module)  # traced
            or not module._c.hasattr("training")  # noqa: SLF001 - frozen: weights are constants now
            or module.state_dict()
        ):
            raise InvalidArgumentError(
                f"'{name}' is a scripted or traced module, which can be followed only where it is "
                f"scripted, not frozen and has no weights; put the eager module in its place, "
                f"prune, and script the result"
            )


# These only stand for an addition or the like in a model that may be quantised later.
_NOT_QUANTISED = frozenset({"FloatFunctional", "FXFloatFunctional"})


def _refuse_packed(model: nn.Module) -> None:
    """Weights that are not plain tensors cannot be sliced."""
    for name, module in modules_of(model):
        kind = type(module)
        if "quantized" in kind.__module__.split(".") and kind.__name__ not in _NOT_QUANTISED:
            raise InvalidArgumentError(
                f"model holds a quantised layer: '{name}' is a {kind.__module__}.{kind.__name__}, "
                f"whose weights are packed; prune the float model and quantise the result"
            )
    for name, tensor in tensors_of(model).items():
        packed: bool = is_traceable_wrapper_subclass(tensor)
        if packed or tensor.is_quantized:
            raise InvalidArgumentError(
                f"parameter '{name}' is a {type(tensor).__name__}, not a plain tensor; prune the "
                f"model before it is quantised or distributed"
            )
