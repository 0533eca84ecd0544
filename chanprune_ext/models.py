"""CIFAR-style residual networks (He et al. 2016, section 4.2): three stages of basic blocks.

They exist so that pruning can be tried on a trained network of realistic depth without any other
package. State-dict keys are ``conv1``, ``bn1``, ``layer{1,2,3}.{i}.{conv1,bn1,conv2,bn2}`` and
``linear``, the naming most published CIFAR checkpoints use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from .errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "CIFAR_RESNETS",
    "CifarResNet",
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet56",
    "resnet110",
]


class PadShortcut(nn.Module):
    """Parameter-free skip ("option A"): every second pixel, zero channels in front and behind.

    The two amounts are attributes and not computed from the input in ``forward``: once channels
    have been removed on both sides of the skip, the front and the back need not be equal any more.

    Args:
        pad_front (int): zero channels put before those of the input.
        pad_back (int): zero channels put after them.
    """

    def __init__(self, pad_front: int, pad_back: int) -> None:
        super().__init__()
        self.pad_front = pad_front
        self.pad_back = pad_back

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[N, C, H, W]`` to ``[N, pad_front + C + pad_back, ceil(H/2), ceil(W/2)]``."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad_front, self.pad_back))

    def extra_repr(self) -> str:
        return f"pad_front={self.pad_front}, pad_back={self.pad_back}"


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, each with batch norm, added to the skip before the last ReLU."""

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        front = (planes - in_planes) // 2
        self.shortcut: nn.Module = (
            nn.Identity() if stride == 1 else PadShortcut(front, planes - in_planes - front)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[N, in_planes, H, W]`` to ``[N, planes, ceil(H/stride), ceil(W/stride)]``."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class CifarResNet(nn.Module):
    """Residual network of ``6n + 2`` layers for small images (He et al. 2016, table 6).

    Args:
        depth (int): number of weighted layers: 20, 32, 44, 56, 110, or any other ``6n + 2 >= 8``.
        num_classes (int): outputs of the classifier. Default: 10.
        in_channels (int): channels of the images, 1 for grey ones. Default: 3.
        width (int): channels of the first stage; the others have twice and four times as many.
            Default: 16.

    Raises:
        InvalidArgumentError: a size is not positive, or ``depth`` is not of the form ``6n + 2``.
    """

    def __init__(
        self, depth: int, num_classes: int = 10, in_channels: int = 3, width: int = 16
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise InvalidArgumentError(
                f"depth: expected 6n + 2 with n >= 1 (20, 32, 44, 56, 110, ...), got {depth}"
            )
        sizes = {"num_classes": num_classes, "in_channels": in_channels, "width": width}
        for name, size in sizes.items():
            if size < 1:
                raise InvalidArgumentError(f"{name}: expected a positive number, got {size}")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, blocks, stride=1)
        self.layer2 = _stage(width, 2 * width, blocks, stride=2)
        self.layer3 = _stage(2 * width, 4 * width, blocks, stride=2)
        self.linear = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images ``[N, in_channels, H, W]`` to logits ``[N, num_classes]``."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        out = F.adaptive_avg_pool2d(out, 1).flatten(1)
        logits: Tensor = self.linear(out)
        return logits


def _stage(in_planes: int, planes: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_planes, planes, stride)
    return nn.Sequential(first, *(BasicBlock(planes, planes, 1) for _ in range(blocks - 1)))


def resnet20(num_classes: int = 10, in_channels: int = 3, width: int = 16) -> CifarResNet:
    """ResNet-20: 0.27 M parameters, 41 M multiply-adds at 32x32 (see :class:`CifarResNet`)."""
    return CifarResNet(20, num_classes, in_channels, width)


def resnet32(num_classes: int = 10, in_channels: int = 3, width: int = 16) -> CifarResNet:
    """ResNet-32: 0.46 M parameters, 69 M multiply-adds at 32x32 (see :class:`CifarResNet`)."""
    return CifarResNet(32, num_classes, in_channels, width)


def resnet44(num_classes: int = 10, in_channels: int = 3, width: int = 16) -> CifarResNet:
    """ResNet-44: 0.66 M parameters, 97 M multiply-adds at 32x32 (see :class:`CifarResNet`)."""
    return CifarResNet(44, num_classes, in_channels, width)


def resnet56(num_classes: int = 10, in_channels: int = 3, width: int = 16) -> CifarResNet:
    """ResNet-56: 0.85 M parameters, 125 M multiply-adds at 32x32 (see :class:`CifarResNet`)."""
    return CifarResNet(56, num_classes, in_channels, width)


def resnet110(num_classes: int = 10, in_channels: int = 3, width: int = 16) -> CifarResNet:
    """ResNet-110: 1.73 M parameters, 253 M multiply-adds at 32x32 (see :class:`CifarResNet`)."""
    return CifarResNet(110, num_classes, in_channels, width)


CIFAR_RESNETS: dict[str, Callable[..., CifarResNet]] = {
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet44": resnet44,
    "resnet56": resnet56,
    "resnet110": resnet110,
}
"""Constructors by the names the command line accepts."""
