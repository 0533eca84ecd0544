"""Blocks of vision networks as people write them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toy_registry import TOYS, Head, Toy, block, conv, toy


class _Bottleneck(nn.Module):
    def __init__(self, channels: int, shortcut: bool = True) -> None:
        super().__init__()
        self.cv1, self.cv2 = block(channels, channels), block(channels, channels)
        self.add = shortcut

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cv2(self.cv1(x)) if self.add else self.cv2(self.cv1(x))


class _Csp(nn.Module):
    """Two narrow branches, one of them deep, joined (C3k)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.cv1, self.cv2 = block(channels, half, 1), block(channels, half, 1)
        self.cv3 = block(2 * half, channels, 1)
        self.m = nn.Sequential(_Bottleneck(half), _Bottleneck(half))

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))


class _SplitDense(nn.Module):
    """Split by an attribute, a chain on the second half, all steps joined (C2f, C3k2)."""

    def __init__(self, i: int, o: int, deep: bool) -> None:
        super().__init__()
        self.c = o // 2
        self.cv1 = block(i, 2 * self.c, 1)
        self.cv2 = block(4 * self.c, o, 1)
        self.m = nn.ModuleList(_Csp(self.c) if deep else _Bottleneck(self.c) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).split((self.c, self.c), 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


@toy()
class SplitDense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = _SplitDense(3, 16, deep=False)
        self.b = _SplitDense(16, 16, deep=True)
        self.head = Head(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x)))


@toy()
class PyramidPooling(nn.Module):
    """One pool applied again and again, all steps joined (SPPF)."""

    def __init__(self) -> None:
        super().__init__()
        self.cv1, self.cv2 = block(3, 12, 1), block(48, 16, 1)
        self.m = nn.MaxPool2d(5, 1, 2)
        self.head = Head(16)

    def forward(self, x: Tensor) -> Tensor:
        y = [self.cv1(x)]
        y.extend(self.m(y[-1]) for _ in range(3))
        return self.head(self.cv2(torch.cat(y, 1)))


def _anchors(maps: list[Tensor], strides: Tensor) -> tuple[Tensor, Tensor]:
    points, steps = [], []
    for k, x in enumerate(maps):
        height, width = x.shape[2:]
        across = torch.arange(width, device=x.device, dtype=x.dtype) + 0.5
        down = torch.arange(height, device=x.device, dtype=x.dtype) + 0.5
        rows, columns = torch.meshgrid(down, across, indexing="ij")
        points.append(torch.stack((columns, rows), -1).view(-1, 2))
        steps.append(strides[k].to(x).expand(height * width, 1))
    return torch.cat(points), torch.cat(steps)


class _Detect(nn.Module):
    """Boxes as distributions over bins and class scores on three maps, decoded in eval mode."""

    def __init__(self, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.nc, self.reg_max = 4, 16
        self.no = self.nc + self.reg_max * 4
        self.shape: Any = None
        self.anchors, self.strides = torch.empty(0), torch.empty(0)
        self.register_buffer("stride", torch.tensor([4.0, 8.0, 16.0]))
        self.cv2 = nn.ModuleList(
            nn.Sequential(block(c, 16), nn.Conv2d(16, 4 * self.reg_max, 1)) for c in channels
        )
        self.cv3 = nn.ModuleList(
            nn.Sequential(block(c, c, groups=c), block(c, 12, 1), nn.Conv2d(12, self.nc, 1))
            for c in channels
        )
        self.dfl = nn.Conv2d(self.reg_max, 1, 1, bias=False).requires_grad_(False)
        self.dfl.weight.data[:] = torch.arange(float(self.reg_max)).view(1, self.reg_max, 1, 1)

    def forward(self, x: list[Tensor]) -> Any:
        for i in range(len(x)):
            x[i] = torch.cat((self.cv2[i](x[i]), self.cv3[i](x[i])), 1)
        if self.training:
            return x
        shape = x[0].shape
        joined = torch.cat([xi.view(shape[0], self.no, -1) for xi in x], 2)
        if self.shape != shape:
            self.anchors, self.strides = (t.transpose(0, 1) for t in _anchors(x, self.stride))
            self.shape = shape
        box, cls = joined.split((self.reg_max * 4, self.nc), 1)
        n, _, a = box.shape
        bins = box.view(n, 4, self.reg_max, a).transpose(2, 1).softmax(1)
        left_top, right_bottom = self.dfl(bins).view(n, 4, a).chunk(2, 1)
        low, high = self.anchors[None] - left_top, self.anchors[None] + right_bottom
        boxes = torch.cat(((low + high) / 2, high - low), 1) * self.strides
        return torch.cat((boxes, cls.sigmoid()), 1), x


@toy(also_kept=("channels meet others that cannot be removed",))
class ThreeScaleDetector(nn.Module):
    """A small pyramid with upsampling and a detection head over three maps."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(conv(3, 16, 3, stride=2), nn.SiLU())
        self.b = nn.Sequential(conv(16, 24, 3, stride=2), nn.SiLU())
        self.c = nn.Sequential(conv(24, 32, 3, stride=2), nn.SiLU())
        self.up = nn.Upsample(scale_factor=2)
        self.d = block(56, 24)
        self.e = block(40, 16)
        self.detect = _Detect((16, 24, 32))

    def forward(self, x: Tensor) -> Any:
        a = self.a(x)
        b = self.b(a)
        c = self.c(b)
        b = self.d(torch.cat((self.up(c), b), 1))
        a = self.e(torch.cat((self.up(b), a), 1))
        return self.detect([a, b, c])


class _RepVgg(nn.Module):
    """A 3x3, a 1x1 and a plain batch norm, summed."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.dense = nn.Sequential(conv(i, o, bias=False), nn.BatchNorm2d(o))
        self.point = nn.Sequential(conv(i, o, 1, bias=False), nn.BatchNorm2d(o))
        self.identity = nn.BatchNorm2d(i) if i == o else None

    def forward(self, x: Tensor) -> Tensor:
        skip = 0 if self.identity is None else self.identity(x)
        return F.relu(self.dense(x) + self.point(x) + skip)


@toy()
class ReparametrisedBranches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential(_RepVgg(3, 16), _RepVgg(16, 16), _RepVgg(16, 24))
        self.head = Head(24)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(x))


@toy()
class BlurPoolByShape(nn.Module):
    """One small kernel, stretched or repeated to as many channels as come."""

    def __init__(self) -> None:
        super().__init__()
        self.a = block(3, 16)
        self.b = block(16, 12)
        taps = torch.tensor([1.0, 2.0, 1.0]) / 4
        self.register_buffer("kernel", (taps[:, None] * taps[None])[None, None])
        self.head = Head(12)

    def forward(self, x: Tensor) -> Tensor:
        a = F.pad(self.a(x), (1, 1, 1, 1), mode="reflect")
        a = F.conv2d(a, self.kernel.expand(a.shape[1], -1, -1, -1), stride=2, groups=a.shape[1])
        b = self.b(a)
        kernel = self.kernel.repeat(b.size(1), 1, 1, 1)
        return self.head(F.conv2d(b, kernel, padding=1, groups=b.size(1)))


@toy()
class LiteralReduction(nn.Module):
    """Squeeze-excite over pooled quarters: the number of parts is a literal, their width is not."""

    def __init__(self) -> None:
        super().__init__()
        self.a = block(3, 32)
        self.fc1, self.fc2 = nn.Linear(8, 6), nn.Linear(6, 8)
        self.b = block(32, 12)
        self.head = Head(12)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        n, c = a.shape[:2]
        pooled = a.mean((2, 3)).view(n, 4, c // 4)
        gate = self.fc2(F.relu(self.fc1(pooled))).sigmoid()
        return self.head(self.b(a * gate.view(n, c, 1, 1)))


@toy()
class SplitAttention(nn.Module):
    """Two versions of every channel, mixed by a softmax over the versions (ResNeSt)."""

    def __init__(self) -> None:
        super().__init__()
        self.radix, self.cardinality = 2, 1
        self.a = block(3, 16)
        self.conv = block(16, 32, groups=2)
        self.fc1, self.fc2 = block(16, 12, 1), nn.Conv2d(12, 32, 1)
        self.b = block(16, 12)
        self.head = Head(12)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.a(x))
        n, c = y.shape[:2]
        y = y.reshape(n, self.radix, c // self.radix, *y.shape[2:])
        gap = y.sum(1).mean((2, 3), keepdim=True)
        weights = self.fc2(self.fc1(gap)).view(n, self.cardinality, self.radix, -1)
        weights = weights.transpose(1, 2).softmax(1).reshape(n, -1)
        y = y * weights.view(n, self.radix, c // self.radix, 1, 1)
        return self.head(self.b(y.sum(1)))


@toy()
class OneHeadTwoSizes(nn.Module):
    """One submodule run on maps of two sizes, whose channels are thereby the same."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = block(3, 16), block(16, 16)
        self.shared = nn.Sequential(block(16, 16), conv(16, 4, 1))

    def forward(self, x: Tensor) -> list[Tensor]:
        a = self.a(x)
        b = F.max_pool2d(self.b(a), 2)
        return [self.shared(a), self.shared(b)]


@toy()
class SkipsAcrossScales(nn.Module):
    """Down, up by a transposed convolution, joined with what was there before (U-Net)."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = block(3, 12), block(12, 24)
        self.up = nn.ConvTranspose2d(24, 12, 2, stride=2)
        self.join = block(24, 12)
        self.out = nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.up(self.down2(F.max_pool2d(a, 2)))
        b = F.pad(b, [0, a.shape[3] - b.shape[3], 0, a.shape[2] - b.shape[2]])
        return self.out(self.join(torch.cat([a, b], 1)))


class ModulatedKernel(nn.Module):
    """Every image gets its own kernel: scaled by a style, normalised, grouped over the batch."""

    def __init__(self, demodulate: bool) -> None:
        super().__init__()
        self.a = block(3, 16)
        self.style = nn.Linear(6, 16)
        self.weight = nn.Parameter(torch.randn(12, 16, 3, 3) / 12)
        self.demodulate = demodulate
        self.head = Head(12)

    def forward(self, image: Tensor, style: Tensor) -> Tensor:
        x = self.a(image)
        n, c, h, w = x.shape
        kernel = self.weight[None] * (self.style(style) + 1).view(n, 1, c, 1, 1)
        if self.demodulate:
            kernel = kernel * torch.rsqrt(kernel.square().sum((2, 3, 4), keepdim=True) + 1e-8)
        o = kernel.shape[1]
        kernel = kernel.view(n * o, c, 3, 3)
        y = F.conv2d(x.reshape(1, n * c, h, w), kernel, padding=1, groups=n)
        return self.head(F.relu(y.view(n, o, h, w)))


for _name, _demodulate in (("ModulatedKernel", False), ("ModulatedNormedKernel", True)):
    TOYS[_name] = Toy(
        _name,
        lambda demodulate=_demodulate: ModulatedKernel(demodulate),
        lambda: (torch.randn(2, 3, 8, 8), torch.randn(2, 6)),
    )


@toy()
class FeaturewiseModulation(nn.Module):
    """Scale and shift of every channel from a pooled vector, made by one layer and cut in two."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = block(3, 16), block(16, 12)
        self.norm = nn.BatchNorm2d(12, affine=False)
        self.film = nn.Linear(16, 24)
        self.head = Head(12)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        scale, shift = self.film(a.mean((2, 3)))[..., None, None].chunk(2, dim=1)
        return self.head((1 + scale) * self.norm(self.b(a)) + shift)


@toy()
class WindowsAsChannels(nn.Module):
    """Local attention weights applied to unfolded windows, per group of channels (involution)."""

    def __init__(self) -> None:
        super().__init__()
        self.groups, self.k = 4, 3
        self.a = block(3, 16)
        self.reduce, self.span = block(16, 8, 1), nn.Conv2d(8, 9 * 4, 1)
        self.b = block(16, 12)
        self.head = Head(12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        n, c, h, w = x.shape
        kernel = self.span(self.reduce(x)).view(n, self.groups, self.k * self.k, h, w)
        windows = F.unfold(x, self.k, padding=1)
        windows = windows.view(n, self.groups, c // self.groups, self.k * self.k, h, w)
        return self.head(self.b((kernel[:, :, None] * windows).sum(3).view(n, c, h, w)))


@toy()
class SpectralFilter(nn.Module):
    """Channels are filtered in the Fourier domain by complex weights stored as pairs (GFNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = block(3, 16), block(16, 12)
        self.filter = nn.Parameter(torch.randn(8, 5, 16, 2) / 4)
        self.mix = nn.Conv2d(24, 24, 1)
        self.c = block(12, 8)
        self.head = Head(8)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x).permute(0, 2, 3, 1)
        spectrum = torch.fft.rfft2(a, dim=(1, 2), norm="ortho")
        spectrum = spectrum * torch.view_as_complex(self.filter)
        a = torch.fft.irfft2(spectrum, s=a.shape[1:3], dim=(1, 2), norm="ortho")
        b = self.b(a.permute(0, 3, 1, 2))
        f = torch.fft.rfft2(b)
        mixed = F.relu(self.mix(torch.cat([f.real, f.imag], 1)))
        real, imag = mixed.chunk(2, 1)
        return self.head(self.c(torch.fft.irfft2(torch.complex(real, imag), s=b.shape[-2:])))
