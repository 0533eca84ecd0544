"""Small networks, each built around one thing that pruners get wrong.

Every toy is a module, inputs for it, and what must come of it: ``"exact"`` (channels go and the
result equals the zeroed original), ``"normalised"`` (channels go, a statistic over them is taken
over those that stay), or ``"frozen"`` (channels stay and the plan says what keeps them).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from toy_registry import TOYS, Head, Toy, block, conv, images, toy

__all__ = ["TOYS", "Toy"]


# -- topology ------------------------------------------------------------------------------------


@toy()
class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, 16)
        self.a = block(16, 24)
        self.b = conv(24, 16)
        self.head = Head(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(F.relu(x + self.b(self.a(x))))


@toy()
class ConcatenatedBranches(nn.Module):
    """Branches of different widths joined, one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a = block(3, 8)
        self.b = block(3, 12, 1)
        self.c = block(28, 16)
        self.head = Head(16)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        return self.head(self.c(torch.cat([a, self.b(x), a], 1)))


@toy()
class ConcatenatedThenAdded(nn.Module):
    """A concatenation meets a plain convolution in a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.a = block(3, 8)
        self.b = block(3, 8)
        self.c = conv(3, 16)
        self.d = block(16, 8)
        self.head = Head(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.d(torch.cat([self.a(x), self.b(x)], 1) + self.c(x)))


@toy()
class ConcatenatedWithZeros(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = block(3, 8)
        self.b = block(12, 16)
        self.head = Head(16)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        zeros = torch.zeros(a.shape[0], 4, *a.shape[2:], device=a.device, dtype=a.dtype)
        return self.head(self.b(torch.cat([a, zeros], 1)))


@toy()
class ChunkGate(nn.Module):
    """Two halves used in the same way: index i goes in both."""

    def __init__(self) -> None:
        super().__init__()
        self.a = block(3, 24)
        self.b = block(12, 16)
        self.head = Head(16)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.a(x).chunk(2, 1)
        return self.head(self.b(value * torch.sigmoid(gate)))


@toy()
class ChunkUnequalUse(nn.Module):
    """Two halves with different readers: equal counts, different channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a = block(3, 24)
        self.b = block(12, 16)
        self.c = conv(12, 16, 1)
        self.head = Head(16)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.a(x).chunk(2, 1)
        return self.head(self.b(first) + self.c(second))


@toy()
class ChunkDense(nn.Module):
    """Split, a chain of residual bottlenecks on one half, everything concatenated (C2f)."""

    def __init__(self) -> None:
        super().__init__()
        self.cv1 = block(3, 16, 1)
        self.m = nn.ModuleList(nn.Sequential(block(8, 8), block(8, 8)) for _ in range(2))
        self.cv2 = block(32, 16, 1)
        self.head = Head(16)

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).chunk(2, 1))
        for m in self.m:
            y.append(y[-1] + m(y[-1]))
        return self.head(self.cv2(torch.cat(y, 1)))


@toy()
class SplitByAttribute(nn.Module):
    """One part passes, the other is convolved, sizes kept on the module."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = [4, 12]
        self.a = block(3, 16)
        self.b = block(12, 12)
        self.c = block(16, 8)
        self.head = Head(8)

    def forward(self, x: Tensor) -> Tensor:
        still, moved = torch.split(self.a(x), self.sizes, dim=1)
        return self.head(self.c(torch.cat([still, self.b(moved)], 1)))


@toy()
class SplitByOneSize(nn.Module):
    """A split size that does not divide the width: the last piece is smaller."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 8
        self.a = block(3, 20)
        self.b = nn.ModuleList([conv(8, 6), conv(8, 6), conv(4, 6)])
        self.head = Head(6)

    def forward(self, x: Tensor) -> Tensor:
        pieces = self.a(x).split(self.size, 1)
        return self.head(sum(b(p) for b, p in zip(self.b, pieces, strict=True)))


@toy()
class BroadcastSum(nn.Module):
    """A one-channel map and a pooled vector join a full map."""

    def __init__(self) -> None:
        super().__init__()
        self.a = block(3, 16)
        self.map = conv(16, 1)
        self.vector = nn.Conv2d(16, 16, 1)
        self.b = block(16, 12)
        self.head = Head(12)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        pooled = F.adaptive_avg_pool2d(a, 1)
        return self.head(self.b(a + self.map(a) + self.vector(pooled)))


@toy(also_kept=("one channel is broadcast against many",))
class OneChannelSlice(nn.Module):
    """A slice of width one, broadcast against all channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a = block(3, 12)
        self.b = block(12, 12)
        self.head = Head(12)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        return self.head(self.b(a) * a[:, 0:1])


@toy(also_kept=("one channel is broadcast against many",))
class OneChannelSliceByAttribute(nn.Module):
    """As above, but the width is an attribute that must not become 0."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = 1
        self.a = block(3, 12)
        self.b = block(12, 12)
        self.head = Head(12)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        return self.head(self.b(a[:, self.gates :].sum(1, keepdim=True) + a) * a[:, : self.gates])


# -- slices --------------------------------------------------------------------------------------


@toy()
class SliceByAttribute(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cut = 6
        self.a = block(3, 16)
        self.b = block(6, 8)
        self.c = block(10, 8)
        self.head = Head(8)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        return self.head(self.b(a[:, : self.cut]) + self.c(a[:, self.cut :]))


@toy()
class SliceFromTheEnd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tail = 6
        self.a = block(3, 16)
        self.b = block(6, 8)
        self.c = block(10, 8)
        self.head = Head(8)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        return self.head(self.b(a[:, -self.tail :]) + self.c(a[:, : -self.tail]))


@toy()
class SliceByShape(nn.Module):
    """Half of the channels, whatever their number."""

    def __init__(self) -> None:
        super().__init__()
        self.a = block(3, 16)
        self.b = block(8, 8)
        self.head = Head(8)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        half = a.shape[1] // 2
        return self.head(self.b(a[:, :half] + a[:, half:]))


@toy(expects="frozen", reason="slice at 6")
class SliceByLiteral(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = block(3, 16)
        self.b = block(6, 24)
        self.c = block(10, 24)
        self.head = Head(24)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        return self.head(self.b(a[:, :6]) + self.c(a[:, 6:]))


@toy()
class StridedSlice(nn.Module):
    """One of every two channels is read: pairs go."""

    def __init__(self) -> None:
        super().__init__()
        self.a = block(3, 16)
        self.b = block(8, 24)
        self.head = Head(24)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x)[:, ::2]))


@toy(expects="frozen", kept_whole=("a.0.weight",), reason="", min_removed=0.1)
class PickedChannels(nn.Module):
    """Channels picked by a list of indices and by a buffer of indices."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("order", torch.tensor([3, 1, 0, 2]))
        self.a = block(3, 16)
        self.b = block(8, 24)
        self.head = Head(24)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        picked = torch.cat([a[:, [0, 5, 7, 9]], a.index_select(1, self.order)], 1)
        return self.head(self.b(picked))


@toy(expects="frozen", kept_whole=("a.0.weight",), reason="fixed places", min_removed=0.1)
class SplitAtFixedPlaces(nn.Module):
    """tensor_split at literal indices: pieces of equal size that must not shrink."""

    def __init__(self) -> None:
        super().__init__()
        self.a = block(3, 12)
        self.b = block(4, 24)
        self.head = Head(24)

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = torch.tensor_split(self.a(x), (4, 8), dim=1)
        return self.head(self.b(first + second * third))


@toy()
class NarrowByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cut = 6
        self.a = block(3, 16)
        self.b = block(6, 8)
        self.head = Head(8)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        return self.head(self.b(torch.narrow(a, length=self.cut, start=0, dim=1)))


# -- reshapes ------------------------------------------------------------------------------------


@toy()
class FlattenGrid(nn.Module):
    """Each channel becomes 49 features of the linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a = block(3, 8)
        self.fc1 = nn.Linear(8 * 49, 20)
        self.fc2 = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        a = F.adaptive_avg_pool2d(self.a(x), 7)
        return self.fc2(F.relu(self.fc1(torch.flatten(a, 1))))


@toy()
class FlattenLastChannels(nn.Module):
    """Channels last, then flattened: a channel is every n-th feature."""

    def __init__(self) -> None:
        super().__init__()
        self.a = block(3, 8)
        self.fc1 = nn.Linear(8 * 64, 20)
        self.fc2 = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x).permute(0, 2, 3, 1)
        return self.fc2(F.relu(self.fc1(a.reshape(a.size(0), -1))))


@toy()
class FlattenByAttribute(nn.Module):
    """The flat size is computed from an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.channels = 8
        self.a = block(3, 8)
        self.fc1 = nn.Linear(8 * 64, 20)
        self.fc2 = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(self.a(x).view(-1, self.channels * 8 * 8))))


@toy(expects="frozen", kept_whole=("a.0.weight",), reason="size 512", min_removed=0.1)
class FlattenByLiteral(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = block(3, 8)
        self.fc1 = nn.Linear(8 * 64, 20)
        self.fc2 = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(self.a(x).view(-1, 512))))


@toy()
class UnflattenLayer(nn.Module):
    """A generator: features become channels of a map."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(10, 12 * 16)
        self.grid = nn.Unflatten(1, (12, 4, 4))
        self.a = block(12, 16)
        self.out = conv(16, 3)

    def forward(self, z: Tensor) -> Tensor:
        return self.out(self.a(self.grid(F.relu(self.fc(z)))))


TOYS["UnflattenLayer"] = Toy("UnflattenLayer", UnflattenLayer, images(2, 10))


@toy()
class ChannelShuffle(nn.Module):
    """Grouped convolutions with a shuffle between them."""

    def __init__(self) -> None:
        super().__init__()
        self.groups = 4
        self.a = block(3, 16)
        self.b = block(16, 16, groups=4)
        self.c = block(16, 16, groups=4)
        self.head = Head(16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x))
        n, c, h, w = y.size()
        y = y.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).contiguous()
        return self.head(self.c(y.view(n, -1, h, w)))


@toy(min_removed=0.2)
class ChannelShuffleResidual(nn.Module):
    """The shuffled branch is added to the unshuffled one."""

    def __init__(self) -> None:
        super().__init__()
        self.groups = 2
        self.a = block(3, 16)
        self.b = block(16, 16)
        self.shuffle = nn.ChannelShuffle(2)
        self.c = block(16, 16)
        self.head = Head(16)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        return self.head(self.c(a + self.shuffle(self.b(a))))


@toy()
class PixelShuffles(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = block(3, 16)
        self.up = nn.PixelShuffle(2)
        self.b = block(4, 12)
        self.down = nn.PixelUnshuffle(2)
        self.c = block(48, 8)
        self.head = Head(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c(self.down(self.b(self.up(self.a(x))))))


@toy()
class Maxout(nn.Module):
    """The largest of every pair of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = 2
        self.a = conv(3, 24)
        self.b = block(12, 16)
        self.head = Head(16)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        n, c, h, w = a.shape
        a = a.view(n, c // self.pool, self.pool, h, w).amax(2)
        return self.head(self.b(a))


@toy()
class StackFlipRepeatExpand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = block(3, 8)
        self.b = block(3, 8)
        self.scale = nn.Parameter(torch.randn(8))
        self.c = block(16, 12)
        self.head = Head(12)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        both = torch.stack([a, b], 1).flip(1).sum(1)
        both = both * self.scale[None, :, None, None].expand_as(both)
        return self.head(self.c(both.repeat(1, 2, 1, 1)))


@toy()
class SqueezeInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = block(3, 16)
        self.fc1 = nn.Linear(16, 12)
        self.fc2 = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.adaptive_avg_pool2d(self.a(x), 1)
        y = y.squeeze_(3).squeeze_(2)
        y.unsqueeze_(1)
        return self.fc2(F.relu(self.fc1(y.squeeze_(1))))


@toy()
class Einsum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = block(3, 16)
        self.mix = nn.Parameter(torch.randn(12, 16) / 4)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.einsum("nchw,oc->nohw", self.a(x), self.mix).relu().mean((2, 3)))


# -- convolutions --------------------------------------------------------------------------------


@toy()
class Depthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = block(3, 16)
        self.dw = block(16, 16, groups=16)
        self.pw = block(16, 24, 1)
        self.head = Head(24)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pw(self.dw(self.a(x))))


@toy()
class DepthwiseMultiplier(nn.Module):
    """Every input channel makes two output channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a = block(3, 16)
        self.dw = block(16, 32, groups=16)
        self.pw = block(32, 24, 1)
        self.head = Head(24)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pw(self.dw(self.a(x))))


@toy()
class GroupedConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = block(3, 24)
        self.g = block(24, 16, groups=4)
        self.b = block(16, 12)
        self.head = Head(12)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.g(self.a(x))))


@toy()
class TransposedConvolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = block(3, 16)
        self.up = nn.ConvTranspose2d(16, 12, 2, stride=2)
        self.grouped = nn.ConvTranspose2d(12, 18, 3, padding=1, groups=3)
        self.b = block(18, 8)
        self.head = Head(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(F.relu(self.grouped(F.relu(self.up(self.a(x)))))))


@toy(inputs=images(2, 4, 20))
class OneDimensional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv1d(4, 16, 3, padding=1)
        self.bn = nn.BatchNorm1d(16)
        self.b = nn.Conv1d(16, 12, 3, dilation=2)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.b(F.relu(self.bn(self.a(x))))).amax(2))


@toy(inputs=images(2, 3, 4, 6, 6))
class ThreeDimensional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv3d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm3d(8)
        self.b = nn.Conv3d(8, 12, (1, 3, 3))
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool3d(F.relu(self.bn(self.a(x))), (1, 2, 2))
        return self.fc(F.relu(self.b(x)).mean((2, 3, 4)))


@toy()
class FunctionalConvolution(nn.Module):
    """Weights are bare parameters; padding is circular."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(16, 3, 3, 3) / 3)
        self.b1 = nn.Parameter(torch.randn(16))
        self.w2 = nn.Parameter(torch.randn(12, 16, 3, 3) / 6)
        self.head = Head(12)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), self.w1, self.b1))
        return self.head(F.relu(F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), self.w2)))


@toy()
class SharedModule(nn.Module):
    """One convolution, run on two different tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.a = block(3, 16)
        self.b = block(16, 16)
        self.head = Head(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.b(self.a(x))))


@toy()
class TiedParameter(nn.Module):
    """Two layers of different kind share one weight tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, 16)
        self.encode = nn.Conv2d(16, 12, 1, bias=False)
        self.decode = nn.ConvTranspose2d(12, 16, 1, bias=False)
        self.decode.weight = self.encode.weight
        self.out = Head(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.decode(F.relu(self.encode(self.stem(x))))))


@toy()
class WeightNormParametrised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.utils.parametrizations.weight_norm(conv(3, 16))
        self.b = nn.utils.parametrizations.weight_norm(conv(16, 12))
        self.head = Head(12)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.b(F.relu(self.a(x)))))


@toy()
class WeightNormHook(nn.Module):
    """The older form: a hook recomputes a plain attribute before each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.utils.weight_norm(conv(3, 16))
        self.b = nn.utils.weight_norm(conv(16, 12))
        self.head = Head(12)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.b(F.relu(self.a(x)))))


class _StandardisedConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        mean = w.mean((1, 2, 3), keepdim=True)
        w = (w - mean) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w, self.bias, self.stride, self.padding)


class WeightStandardisation(nn.Module):
    """The kernel is computed from the stored weight by statistics over its input channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a = _StandardisedConv(3, 16, 3, padding=1)
        self.b = _StandardisedConv(16, 12, 3, padding=1)
        self.head = Head(12)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.b(F.relu(self.a(x)))))


TOYS["WeightStandardisation"] = Toy(
    "WeightStandardisation", WeightStandardisation, expects="normalised"
)


class _StandardisedByBatchNorm(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        w = F.batch_norm(flat, None, None, training=True, momentum=0.0).reshape_as(self.weight)
        return F.conv2d(x, w, self.bias, self.stride, self.padding)


class StandardisedAfterInPlace(nn.Module):
    """What reaches the standardised kernel is zero where channels go, its statistics are not."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.b, self.c = _StandardisedByBatchNorm(16, 12, 3, padding=1), nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(F.relu_(self.norm(self.a(x)))))


TOYS["StandardisedAfterInPlace"] = Toy(
    "StandardisedAfterInPlace", StandardisedAfterInPlace, expects="normalised"
)


@toy()
class ScaledWeight(nn.Module):
    """The kernel is the product of a weight and a per-channel parameter (equalised training)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 3, 3, 3))
        self.gain = nn.Parameter(torch.randn(16, 1, 1, 1))
        self.b = block(16, 12)
        self.head = Head(12)

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.weight * self.gain * math.sqrt(0.1), padding=1)
        return self.head(self.b(F.relu(y)))


# -- channel vectors -----------------------------------------------------------------------------


@toy()
class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = block(3, 16)
        self.down = nn.Conv2d(16, 8, 1)
        self.up = nn.Conv2d(8, 16, 1)
        self.b = block(16, 12)
        self.head = Head(12)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        gate = self.up(F.relu(self.down(F.adaptive_avg_pool2d(a, 1)))).sigmoid()
        return self.head(self.b(a * gate))


@toy()
class LinearSqueezeExcite(nn.Module):
    """The gate goes through linear layers and views with the batch size first."""

    def __init__(self) -> None:
        super().__init__()
        self.a = block(3, 16)
        self.fc = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 16), nn.Sigmoid())
        self.head = Head(16)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        n, c, _, _ = a.size()
        gate = self.fc(F.adaptive_avg_pool2d(a, 1).view(n, c)).view(n, c, 1, 1)
        return self.head(a * gate.expand_as(a))


@toy()
class PReLUs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = conv(3, 16)
        self.each = nn.PReLU(16)
        self.b = conv(16, 12)
        self.one = nn.PReLU()
        self.head = Head(12)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.one(self.b(self.each(self.a(x)))))


@toy()
class ChannelVectors(nn.Module):
    """A layer scale (parameter) and a mean to subtract (buffer), both as wide as the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.randn(1, 16, 1, 1))
        self.register_buffer("spread", torch.rand(16) + 0.5, persistent=False)
        self.gamma = nn.Parameter(torch.randn(16, 1, 1))
        self.a = block(3, 16)
        self.b = conv(16, 16)
        self.c = conv(16, 12)
        self.head = Head(12)

    def forward(self, x: Tensor) -> Tensor:
        a = (self.a(x) - self.mean) / self.spread.view(1, -1, 1, 1)
        return self.head(F.relu(self.c(a + self.gamma * self.b(a))))


@toy()
class PositionTable(nn.Module):
    """A learnt map added to the channels: positions stay, channels go."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, 16, 8, 8))
        self.a = block(3, 16)
        self.b = block(16, 12)
        self.head = Head(12)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x) + self.table))


@toy()
class GatedLinearUnit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = conv(3, 24)
        self.b = block(12, 16)
        self.head = Head(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(F.glu(self.a(x), 1)))


class ZeroPadShortcut(nn.Module):
    """Channels padded with zeros, the amounts kept on the module."""

    def __init__(self, by_literal: bool = False) -> None:
        super().__init__()
        self.front, self.back = 4, 4
        self.by_literal = by_literal
        self.a = block(3, 8)
        self.b = conv(8, 16)
        self.c = block(16, 12)
        self.head = Head(12)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        if self.by_literal:
            skip = F.pad(a, (0, 0, 0, 0, 4, 4))
        else:
            skip = F.pad(a, (0, 0, 0, 0, self.front, self.back))
        return self.head(self.c(F.relu(self.b(a) + skip)))


TOYS["ZeroPadShortcut"] = Toy("ZeroPadShortcut", ZeroPadShortcut)
TOYS["ZeroPadShortcutByLiteral"] = Toy(
    "ZeroPadShortcutByLiteral",
    lambda: ZeroPadShortcut(by_literal=True),
    expects="frozen",
    kept_whole=(),
    reason="padding by 4",
    min_removed=0.1,
)


# -- normalisation and attention -----------------------------------------------------------------


class _Normed(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.a = conv(3, 16)
        self.norm = norm
        self.b = block(16, 12)
        self.head = Head(12)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(F.relu(self.norm(self.a(x)))))


class _LastNorm(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _register_norms() -> None:
    for name, norm, expects in (
        ("GroupNorm4", lambda: nn.GroupNorm(4, 16), "normalised"),
        ("GroupNorm1", lambda: nn.GroupNorm(1, 16), "normalised"),
        ("InstanceNormAffine", lambda: nn.InstanceNorm2d(16, affine=True), "exact"),
        ("InstanceNormPlain", lambda: nn.InstanceNorm2d(16), "exact"),
        (
            "InstanceNormTracked",
            lambda: nn.InstanceNorm2d(16, affine=True, track_running_stats=True),
            "exact",
        ),
        ("LayerNormOverChannels", lambda: _LastNorm(nn.LayerNorm(16)), "normalised"),
        (
            "LayerNormPlain",
            lambda: _LastNorm(nn.LayerNorm(16, elementwise_affine=False)),
            "normalised",
        ),
        ("RMSNormOverChannels", lambda: _LastNorm(nn.RMSNorm(16)), "normalised"),
        ("BatchNormPlain", lambda: nn.BatchNorm2d(16, affine=False), "exact"),
        ("BatchNormOfBatch", lambda: nn.BatchNorm2d(16, track_running_stats=False), "exact"),
        ("LocalResponseNorm", lambda: nn.LocalResponseNorm(3), "frozen"),
    ):
        TOYS[name] = Toy(
            name,
            lambda norm=norm: _Normed(norm()),
            expects=expects,
            kept_whole=("a.weight",) if expects == "frozen" else (),
            min_removed=0.1 if expects == "frozen" else 0.25,
        )


_register_norms()


@toy(expects="frozen", kept_whole=("a.weight",), reason="depends on all others", min_removed=0.1)
class SoftmaxOverChannels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = conv(3, 8)
        self.b = block(8, 24)
        self.head = Head(24)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x).softmax(1)))


@toy(also_kept=("every channel depends on all others",))
class ChannelAttention(nn.Module):
    """Channels attend to channels: the affinity of a pair is normalised over the second."""

    def __init__(self) -> None:
        super().__init__()
        self.a = block(3, 16)
        self.b = block(16, 24)
        self.head = Head(24)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        n, c, h, w = a.shape
        flat = a.view(n, c, h * w)
        affinity = torch.softmax(flat @ flat.transpose(1, 2), -1)
        return self.head(self.b((affinity @ flat).view(n, c, h, w) + a))


@toy()
class SpatialAttention(nn.Module):
    """Positions attend to positions through two projections (non-local block)."""

    def __init__(self) -> None:
        super().__init__()
        self.a = block(3, 16)
        self.q = nn.Conv2d(16, 8, 1)
        self.k = nn.Conv2d(16, 8, 1)
        self.v = nn.Conv2d(16, 16, 1)
        self.gamma = nn.Parameter(torch.tensor(0.7))
        self.head = Head(16)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        n, c, h, w = a.size()
        q = self.q(a).view(n, -1, h * w).permute(0, 2, 1)
        k = self.k(a).view(n, -1, h * w)
        weights = torch.softmax(torch.bmm(q, k), dim=-1)
        y = torch.bmm(self.v(a).view(n, -1, h * w), weights.permute(0, 2, 1)).view(n, c, h, w)
        return self.head(self.gamma * y + a)


TOYS["SpatialAttention"] = Toy("SpatialAttention", SpatialAttention)


class ChannelStatistics(nn.Module):
    """A spatial gate made of the mean and the maximum over the channels (CBAM)."""

    def __init__(self) -> None:
        super().__init__()
        self.a = block(3, 16)
        self.gate = conv(2, 1)
        self.b = block(16, 12)
        self.head = Head(12)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        stats = torch.cat([a.mean(1, keepdim=True), a.max(1, keepdim=True).values], 1)
        return self.head(self.b(a * self.gate(stats).sigmoid()))


TOYS["ChannelStatistics"] = Toy("ChannelStatistics", ChannelStatistics, expects="normalised")


class SumOfGates(nn.Module):
    """A sum over channels that are not zero when their producer is."""

    def __init__(self) -> None:
        super().__init__()
        self.a = conv(3, 16)
        self.b = block(16, 12)
        self.head = Head(12)

    def forward(self, x: Tensor) -> Tensor:
        gates = self.a(x).sigmoid()
        return self.head(self.b(gates / gates.sum(1, keepdim=True)))


TOYS["SumOfGates"] = Toy("SumOfGates", SumOfGates, expects="normalised")


class LinearAttention(nn.Module):
    """Queries and keys are made positive, so a zeroed one still counts."""

    def __init__(self) -> None:
        super().__init__()
        self.a = block(3, 16)
        self.q = nn.Conv2d(16, 8, 1)
        self.k = nn.Conv2d(16, 8, 1)
        self.v = nn.Conv2d(16, 12, 1)
        self.head = Head(12)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        q = F.elu(self.q(a)).flatten(2) + 1
        k = F.elu(self.k(a)).flatten(2) + 1
        v = self.v(a)
        context = v.flatten(2) @ k.transpose(1, 2)
        return self.head((context @ q).view_as(v))


TOYS["LinearAttention"] = Toy("LinearAttention", LinearAttention, expects="normalised")


# -- how a forward is written --------------------------------------------------------------------


@torch.library.custom_op("chanprune_toys::mystery", mutates_args=())
def _mystery(x: Tensor) -> Tensor:
    return x * 2 + 1


_mystery.register_autograd(lambda ctx, grad: grad * 2)


@_mystery.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@toy(
    expects="frozen",
    kept_whole=("stage.0.0.weight",),
    reason="no rule for chanprune_toys::mystery",
    min_removed=0.1,
)
class UnknownOperation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stage = nn.Sequential(block(3, 16))
        self.b = block(16, 24)
        self.head = Head(24)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(torch.ops.chanprune_toys.mystery(self.stage(x))))


@toy()
class InPlaceOperations(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = conv(3, 16)
        self.b = conv(16, 16)
        self.act = nn.LeakyReLU(0.1, inplace=True)
        self.head = Head(16)

    def forward(self, x: Tensor) -> Tensor:
        a = self.act(self.a(x))
        b = self.b(a)
        b += a
        b.mul_(0.5).clamp_(min=0)
        b[:, :, 0] = 0
        return self.head(b)


@toy()
class ViewChangedInPlace(nn.Module):
    """The halves of a tensor are changed through views of it."""

    def __init__(self) -> None:
        super().__init__()
        self.cut = 8
        self.a = block(3, 16)
        self.b = conv(3, 8)
        self.c = block(16, 12)
        self.head = Head(12)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        a = a.clone()
        a[:, : self.cut] += self.b(x)
        a[:, self.cut :].mul_(2)
        return self.head(self.c(a))


@toy()
class FilledBuffer(nn.Module):
    """Branches are written side by side into an empty tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a = block(3, 8)
        self.b = block(3, 12)
        self.c = block(20, 12)
        self.head = Head(12)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        width = a.shape[1] + b.shape[1]
        y = a.new_empty(a.shape[0], width, *a.shape[2:])
        y[:, : a.shape[1]] = a
        y[:, a.shape[1] :] = b
        return self.head(self.c(y))


@toy()
class DetachedBranch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = block(3, 16)
        self.b = block(16, 12)
        self.c = block(16, 12)
        self.head = Head(12)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        return self.head(self.b(a) + self.c(a.detach()) + self.c(a.data.clone()))


@toy()
class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = block(3, 16)
        self.b = block(16, 12)
        self.head = Head(12)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.b, self.a(x), use_reentrant=False))


@toy()
class DictOutput(nn.Module):
    """Outputs nested in a dict and a tuple, one of them an inner map."""

    def __init__(self) -> None:
        super().__init__()
        self.a = block(3, 24)
        self.b = block(24, 8)
        self.c = block(8, 24)
        self.head = Head(24)

    def forward(self, x: Tensor) -> dict[str, Any]:
        b = self.b(self.a(x))
        return {"logits": self.head(self.c(b)), "maps": (b, [b.mean((2, 3))])}


TOYS["DictOutput"] = Toy(
    "DictOutput",
    DictOutput,
    expects="frozen",
    kept_whole=("b.0.weight",),
    reason="model's output",
)


@toy(inputs=lambda: {"image": torch.randn(2, 3, 8, 8), "vector": torch.randn(2, 6)})
class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = block(3, 16)
        self.fc = nn.Linear(6, 16)
        self.b = block(16, 12)
        self.head = Head(12)

    def forward(self, vector: Tensor, image: Tensor) -> Tensor:
        return self.head(self.b(self.a(image) * self.fc(vector)[:, :, None, None]))


@toy()
class UnusedParameters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = block(3, 16)
        self.never = nn.Linear(16, 16)
        self.b = block(16, 12)
        self.head = Head(12)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x)))


@toy()
class AuxiliaryHead(nn.Module):
    """A second head that only runs in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.a = block(3, 16)
        self.b = block(16, 12)
        self.aux = Head(16)
        self.head = Head(12)

    def forward(self, x: Tensor) -> Any:
        a = self.a(x)
        y = self.head(self.b(a))
        return (y, self.aux(a)) if self.training else y


@toy()
class LoopsAndBranches(nn.Module):
    """Control flow on sizes and on flags."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([block(3, 12), block(12, 12), block(12, 12)])
        self.project = nn.ModuleDict({"0": conv(3, 12, 1)})
        self.head = Head(12)

    def forward(self, x: Tensor) -> Tensor:
        for k, layer in enumerate(self.layers):
            y = layer(x)
            x = self.project[str(k)](x) + y if str(k) in self.project else x + y
        return self.head(x)


@toy()
class ChannelsLast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = block(3, 16)
        self.dw = block(16, 16, groups=16)
        self.b = block(16, 12)
        self.head = Head(12)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(memory_format=torch.channels_last)
        return self.head(self.b(self.dw(self.a(x))))


@toy()
class SharedBatchNorm(nn.Module):
    """Two convolutions meet in one batch norm, run twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a = conv(3, 16)
        self.b = conv(3, 16)
        self.bn = nn.BatchNorm2d(16)
        self.c = block(16, 12)
        self.head = Head(12)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c(self.bn(self.a(x)).relu() * self.bn(self.b(x)).sigmoid()))


@toy(inputs=images(2, 7, 6))
class Recurrent(nn.Module):
    """A linear layer run step by step on its own output."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(6, 16)
        self.step = nn.Linear(16, 16)
        self.out = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], self.step.in_features)
        for t in range(x.shape[1]):
            state = torch.tanh(self.read(x[:, t]) + self.step(state))
        return self.out(state)


@toy(
    inputs=lambda: torch.randint(0, 20, (2, 9)),
)
class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 16)
        self.a = nn.Conv1d(16, 24, 3, padding=1)
        self.fc = nn.Linear(24, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.fc(F.relu(self.a(self.table(ids).transpose(1, 2))).mean(-1))


@toy()
class DilatedPoolingUpsampling(nn.Module):
    """Branches at several scales, interpolated back (ASPP)."""

    def __init__(self) -> None:
        super().__init__()
        self.a = block(3, 16)
        self.b = nn.Conv2d(16, 8, 3, padding=2, dilation=2)
        self.c = nn.Conv2d(16, 8, 1)
        self.d = block(16, 12)
        self.out = nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.max_pool2d(self.a(x), 2)
        pooled = self.c(F.adaptive_avg_pool2d(a, 1))
        pooled = F.interpolate(pooled, size=a.shape[2:], mode="bilinear")
        y = self.d(torch.cat([self.b(a), pooled], 1))
        return self.out(F.interpolate(y, scale_factor=2, mode="nearest"))


@toy(
    expects="frozen",
    kept_whole=("a.0.weight",),
    reason="used in a computation",
    min_removed=0.1,
)
class DividedByWidth(nn.Module):
    """A mean written as a sum over the width: dividing by fewer would change what stays."""

    def __init__(self) -> None:
        super().__init__()
        self.a = block(3, 16)
        self.b = block(16, 24)
        self.head = Head(24)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        return self.head(self.b(a - a.sum(1, keepdim=True) / a.shape[1]))


@toy(
    expects="frozen",
    kept_whole=("a.0.weight",),
    reason="used in a computation",
    min_removed=0.1,
)
class ScaledByAttribute(nn.Module):
    """One attribute is a size and a factor."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 16
        self.a = block(3, 16)
        self.b = block(16, 24)
        self.head = Head(24)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        a = a.view(a.shape[0], self.width, -1) / self.width
        return self.head(self.b(a.view(a.shape[0], self.width, *x.shape[2:])))


@toy(
    expects="frozen",
    kept_whole=("a.0.weight",),
    reason="",
    min_removed=0.1,
)
class ScaledByRoot(nn.Module):
    """A float computed from a size."""

    def __init__(self) -> None:
        super().__init__()
        self.a = block(3, 16)
        self.b = block(16, 24)
        self.head = Head(24)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        return self.head(self.b(a * a.shape[1] ** -0.5))


@toy()
class ComparedSizes(nn.Module):
    """A check of a width against an attribute, which must follow."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 16
        self.a = block(3, 16)
        self.b = block(16, 12)
        self.head = Head(12)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        if a.shape[1] != self.width:
            raise ValueError("wrong width")
        return self.head(self.b(a))


@toy(expects="frozen", kept_whole=("a.0.weight",), reason="must stay equal", min_removed=0.1)
class BranchOnLiteral(nn.Module):
    """A path that is only taken at one width."""

    def __init__(self) -> None:
        super().__init__()
        self.a = block(3, 16)
        self.b = block(16, 24)
        self.head = Head(24)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        return self.head(self.b(a * 2 if a.size(1) == 16 else a))


@toy()
class StoresOnItself(nn.Module):
    """A forward that counts its runs and caches a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.runs = 0
        self.cache = None
        self.a = block(3, 16)
        self.b = block(16, 12)
        self.head = Head(12)

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        self.cache = self.a(x)
        return self.head(self.b(self.cache))


@toy()
class SharedModuleUnderTwoPaths(nn.Module):
    """One convolution registered in two different submodules."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, 16)
        both = conv(16, 16)
        self.a = nn.Sequential(both, nn.BatchNorm2d(16), nn.ReLU())
        self.b = nn.Sequential(both, nn.BatchNorm2d(16), nn.ReLU())
        self.head = Head(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(self.stem(x))))


@toy(inputs=images(2, 7, 6), min_removed=0.2)
class LongShortTermMemory(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(6, 16)
        self.lstm = nn.LSTM(16, 8, batch_first=True)
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(F.relu(self.read(x)))[0])


@toy(expects="frozen", kept_whole=("a.0.weight",), reason="size 16", min_removed=0.1)
class TrainingPath(nn.Module):
    """A literal that only the training mode meets."""

    def __init__(self) -> None:
        super().__init__()
        self.a = block(3, 16)
        self.b = block(16, 24)
        self.head = Head(24)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        if self.training:
            a = a.view(-1, 16, 8, 8)
        return self.head(self.b(a))


@toy(expects="frozen", kept_whole=("a.0.weight",), reason="fixed position", min_removed=0.1)
class ChannelUsedInTraining(nn.Module):
    """In eval mode one channel is only asked for its shape; in training it is computed with."""

    def __init__(self) -> None:
        super().__init__()
        self.a = block(3, 16)
        self.b = block(16, 24)
        self.head = Head(24)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        first = a[:, 0]
        y = self.head(self.b(a))
        return y + first.mean() if self.training else y + 0 * len(first.shape)


@toy()
class BooleanMask(nn.Module):
    """Buffers of truth values and whole numbers, as wide as the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a = block(3, 16)
        self.b = block(16, 12)
        self.register_buffer("mask", torch.rand(1, 16, 1, 1) > 0.3)
        self.register_buffer("levels", torch.arange(12))
        self.head = Head(12)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x) * self.mask) * self.levels[:, None, None])


@toy()
class SpectralNorm(nn.Module):
    """A weight divided by its largest singular value, followed by power iteration in training."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.utils.parametrizations.spectral_norm(conv(3, 16))
        self.b = nn.utils.parametrizations.spectral_norm(conv(16, 12))
        self.head = Head(12)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.b(F.relu(self.a(x)))))


@toy(inputs=lambda: [torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)])
class ListOfImages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = block(3, 16)
        self.head = Head(16)

    def forward(self, images: list[Tensor]) -> list[Tensor]:
        return [self.head(self.a(x)) for x in images]


@toy(also_kept=("every channel depends on all others",))
class MixtureOfKernels(nn.Module):
    """Every image gets its own kernel, a mixture chosen by its content (CondConv)."""

    def __init__(self) -> None:
        super().__init__()
        self.a = block(3, 16)
        self.route = nn.Linear(16, 4)
        self.kernels = nn.Parameter(torch.randn(4, 12, 16, 1, 1) / 4)
        self.head = Head(12)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        n, c, h, w = a.shape
        chosen = torch.softmax(self.route(a.mean((2, 3))), 1)
        kernel = torch.einsum("ne,eoihw->noihw", chosen, self.kernels)
        o = kernel.shape[1]
        y = F.conv2d(a.reshape(1, n * c, h, w), kernel.reshape(n * o, c, 1, 1), groups=n)
        return self.head(F.relu(y.view(n, o, h, w)))


@toy()
class BlurPool(nn.Module):
    """A fixed kernel, one copy per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.a = block(3, 16)
        self.register_buffer("blur", torch.ones(16, 1, 3, 3) / 9)
        self.b = block(16, 12)
        self.head = Head(12)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        return self.head(self.b(F.conv2d(a, self.blur, stride=2, groups=a.shape[1])))


# Toys of other files register themselves in the same table.
import toys_attention  # noqa: E402, F401
import toys_modules  # noqa: E402, F401
import toys_vision  # noqa: E402, F401
