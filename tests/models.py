"""Networks for the tests, and an oracle of exactness apart from the package's own verification."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torchvision
from torch import Tensor, nn

from chanprune_ext.copying import copied
from chanprune_ext.models import resnet56

if TYPE_CHECKING:
    from collections.abc import Callable

    from chanprune_ext import PruningPlan

__all__ = [
    "NETWORKS",
    "called",
    "doubled",
    "leaves",
    "network",
    "randomised",
    "relative_error",
    "run",
    "zeroed",
]


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """``model`` in eval mode with nothing left at a neutral value that would hide a mistake.

    Batch-norm statistics and affine parameters, biases and layer scales get random values; weights
    keep their size.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor: Tensor, low: float, high: float) -> None:
        values = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
        tensor.copy_((low + (high - low) * values).to(tensor.dtype))

    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.dim() <= 1:
                draw(tensor, 0.5, 1.5) if name.endswith("weight") else draw(tensor, -0.5, 0.5)
        for module in model.modules():
            if getattr(module, "running_mean", None) is not None:
                draw(module.running_mean, -0.5, 0.5)
                draw(module.running_var, 0.5, 1.5)
    return model.eval()


def doubled(value: Any) -> Any:
    """``value`` with every floating tensor inside in float64."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {k: doubled(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(doubled(v) for v in value)
    return value


def leaves(value: Any) -> list[Tensor]:
    """All tensors in a nested output, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return [leaf for item in value for leaf in leaves(item)]
    return []


def run(model: nn.Module, inputs: Any) -> list[Tensor]:
    """The outputs of ``model`` in float64 and eval mode, on a copy of it."""
    with torch.no_grad():
        return leaves(called(copied(model).double().eval(), doubled(inputs)))


def called(model: nn.Module, inputs: Any) -> Any:
    """``model`` on a tuple of positional inputs, a dict of keyword inputs or a single input."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def zeroed(model: nn.Module, plan: PruningPlan) -> nn.Module:
    """A copy of ``model`` in which every parameter slice that ``plan`` removes is zero.

    Written with plain indexing, one index at a time, from ``plan.pruned`` alone.
    """
    reference = copied(model)
    parameters = dict(reference.named_parameters())
    with torch.no_grad():
        for entry, dims in plan.pruned.items():
            if entry not in parameters:
                continue
            for dim, removed in dims.items():
                if entry.endswith((".original1", ".weight_v")) and dim == 0:
                    continue  # weight norm divides by it; the magnitude beside it is zeroed
                view = parameters[entry].transpose(0, dim)
                for index in removed.tolist():
                    view[index] = 0
    return reference


def relative_error(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference over the largest value, the worst of all outputs."""
    assert len(actual) == len(expected) > 0
    worst = 0.0
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape
        if not b.numel():
            continue
        assert torch.isfinite(b).all(), "the reference itself is not finite"
        scale = b.double().abs().max().item() or 1.0
        worst = max(worst, (a.double() - b.double()).abs().max().item() / scale)
    return worst


def _torchvision(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(torchvision.models, name)(weights=None, num_classes=10, **options)


# The networks that must be exact, by the names people know them by. GoogLeNet keeps its auxiliary
# heads, which only run in training mode.
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": _torchvision("resnet18"),
    "resnet50": _torchvision("resnet50"),
    "mobilenet_v2": _torchvision("mobilenet_v2"),
    "densenet121": _torchvision("densenet121"),
    "shufflenet_v2_x1_0": _torchvision("shufflenet_v2_x1_0"),
    "efficientnet_b0": _torchvision("efficientnet_b0"),
    "regnet_y_400mf": _torchvision("regnet_y_400mf"),
    "googlenet": _torchvision("googlenet", init_weights=False),
    "vgg16_bn": _torchvision("vgg16_bn", init_weights=False),
    "resnext50_32x4d": _torchvision("resnext50_32x4d"),
    "resnet56": resnet56,
}
SIDES = {"resnet56": 32}


def network(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """One of :data:`NETWORKS` with random statistics, and a batch of two small images."""
    torch.manual_seed(seed)
    model = randomised(NETWORKS[name](), seed)
    side = SIDES.get(name, 64)
    return model, torch.randn(2, 3, side, side)
