"""Runs of a model in float64, also where its code insists on float32."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from chanprune_ext.analysis.calls import CallMode, steady_calls, tensors_in
from chanprune_ext.analysis.module_path import ModulePath
from chanprune_ext.analysis.stand_ins import call_substituted

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Float64Mode", "in_float64", "plain", "run_in_float64"]


class Float64Mode(CallMode):
    """Runs in float64 what a model insists on computing in float32."""

    def call(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if any(a is torch.float32 for a in (*args, *kwargs.values())):
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
            kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in kwargs.items()}
        if name == "float":
            func = Tensor.double
        elif name in ("grouped_mm", "_grouped_mm"):
            func = _grouped_product
        elif name == "type" and len(args) > 1 and args[1] == "torch.FloatTensor":
            args = (args[0], "torch.DoubleTensor")
        return super().call(name, func, args, kwargs)


def _grouped_product(x: Tensor, weights: Tensor, *, offs: Tensor, **_: Any) -> Tensor:
    """``torch.nn.functional.grouped_mm`` of (n, k) and (groups, k, m), which has no float64."""
    starts = [0, *offs.tolist()]
    products = [x[a:b] @ w for a, b, w in zip(starts[:-1], starts[1:], weights, strict=True)]
    return torch.cat([*products, x.new_zeros(len(x) - starts[-1], weights.shape[2])])


def _widened(value: Any, key: str = "") -> Any:
    """Nested inputs in float64, but for key points, which torchvision wants in float32."""
    if isinstance(value, dict):
        return {k: _widened(v, str(k)) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_widened(v) for v in value)
    if isinstance(value, Tensor):
        keep = key == "keypoints" or not value.is_floating_point()
        return value.clone() if keep else value.double()
    return value


def _settled(output: Any) -> Any:
    """Of detections, what does not hang on the order of boxes with equal scores."""
    if isinstance(output, (list, tuple)) and type(output) in (list, tuple):
        return type(output)(_settled(v) for v in output)
    scores = output.get("scores") if type(output) is dict and "boxes" in output else None
    if isinstance(scores, Tensor) and scores.dim() == 1 and len(scores):
        gaps = torch.cat([scores.new_ones(1), scores.diff().abs(), scores.new_ones(1)])
        alone = (gaps[1:] > 1e-6) & (gaps[:-1] > 1e-6)
        return {k: v if k == "scores" else v[alone] for k, v in output.items()}
    return output


def run_in_float64(
    model: nn.Module, inputs: Any, mode: Callable[[ModulePath], CallMode], seed: int
) -> Any:
    """The output of ``model``, which forgets what its forward stores on it."""
    default = torch.get_default_dtype()
    inputs = _widened(inputs)
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(seed)
        with steady_calls(model), ModulePath(model) as path, mode(path):
            return _settled(call_substituted(model, {}, inputs))
    finally:
        torch.set_default_dtype(default)


def plain(_: ModulePath) -> CallMode:
    return Float64Mode()


def in_float64(model: nn.Module, inputs: Any, seed: int = 0) -> list[Tensor]:
    """All output tensors of ``model``, which is turned to float64 in place, in eval mode."""
    return tensors_in(run_in_float64(model.double(), inputs, plain, seed))
