"""Windows, Fourier transforms, batched products, stretched and reshaped tensors, unequal chunks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from between import assert_needed, assert_normalises, assert_passes, assert_stays, between
from models import relative_error, run, zeroed
from torch import Tensor, nn

import chanprune_ext as cpx

if TYPE_CHECKING:
    from collections.abc import Callable


def spectrum(x: Tensor) -> Tensor:
    return torch.fft.rfft2(x)


def back(x: Tensor) -> Tensor:
    return torch.fft.irfft2(x, s=(4, 6))


def turned(x: Tensor) -> Tensor:
    """Pairs of channels as complex numbers, turned by an angle of each row."""
    pairs = x.permute(0, 1, 3, 2).reshape(2, -1, 6, 2, 2).contiguous()
    angles = torch.arange(2.0, device=x.device).to(x)
    turns = torch.polar(torch.ones_like(angles), angles)
    result = torch.view_as_real(torch.view_as_complex(pairs) * turns)
    return result.flatten(3).permute(0, 1, 3, 2)


def filtered(m: nn.Module, x: Tensor) -> Tensor:
    """Multiplied by complex numbers that a parameter holds as pairs."""
    pairs = torch.stack([m.parts.vector, m.parts.vector.sin()], -1)
    return back(spectrum(x) * torch.view_as_complex(pairs)[:, None, None])


def heads(m: nn.Module, x: Tensor) -> Tensor:
    """Windows of channels seen as heads, each summed over its window."""
    windows = F.unfold(x, 3, padding=1).view(2, m.half, -1, 9, 24)
    return windows.sum(3).flatten(1, 2)[..., None]


def widths_gated(x: Tensor) -> Tensor:
    """Every channel of a head times the sum of that head."""
    return (x * x.sum(2, keepdim=True)).flatten(1, 2)


def product(x: Tensor, **scales: float) -> Tensor:
    """Channels times how positions resemble each other, on top of a matrix of ones."""
    flat = x.flatten(2)
    alike = torch.baddbmm(x.new_ones(1, 24, 24), flat.mT, flat, **scales)
    return (flat @ alike.softmax(1)).view(x.shape)


def onto(added: Tensor, x: Tensor, **scales: float) -> Tensor:
    flat = x.flatten(2)
    return torch.baddbmm(added, flat, flat.mT @ flat, **scales).view(x.shape)


PASSES: dict[str, Callable[..., Tensor]] = {
    "im2col": lambda m, x: F.unfold(x, 3, padding=1)[..., None],
    "im2col seen as channels and windows": lambda m, x: (
        F.unfold(x, 3, padding=1).view(2, x.shape[1], 9, 4, 6).amax(2)
    ),
    "im2col seen as heads": heads,
    "im2col and back": lambda m, x: F.fold(F.unfold(x, 3, padding=1), (4, 6), 3, padding=1),
    "im2col of single images": lambda m, x: torch.stack(
        [F.fold(F.unfold(y, 3, padding=1), (4, 6), 3, padding=1) for y in x]
    ),
    "unfold": lambda m, x: x.unfold(2, 2, 1).unfold(3, 3, 3).amax((-1, -2)),
    "unfold from the end": lambda m, x: x.unfold(-1, 3, 3)[..., 1],
    "Fourier and back": lambda m, x: back(spectrum(x)),
    "magnitudes": lambda m, x: torch.fft.fft2(x).abs(),
    "real and imaginary parts": lambda m, x: torch.cat([spectrum(x).real, spectrum(x).imag], 1),
    "pairs as channels": lambda m, x: (
        torch.view_as_real(spectrum(x)).permute(0, 1, 4, 2, 3).flatten(1, 2)
    ),
    "power": lambda m, x: (spectrum(x) * spectrum(x).conj()).real,
    "complex from two": lambda m, x: back(torch.complex(spectrum(x).real, spectrum(x).imag)),
    "pairs of rows turned": lambda m, x: turned(x),
    "complex weights": filtered,
    "Hermitian transform": lambda m, x: torch.fft.hfft(x, dim=2),
    "baddbmm": lambda m, x: onto(m.parts.vector.view(1, -1, 1), x),
    "baddbmm scaled": lambda m, x: product(x, beta=0.5, alpha=2),
    "baddbmm onto nothing": lambda m, x: onto(x.new_empty(2, x.shape[1], 24), x, beta=0),
    "kernel stretched from a vector": lambda m, x: F.conv2d(
        x, m.parts.vector[:, None, None, None].expand(-1, 1, 3, 3), groups=x.shape[1]
    ),
    "kernel stretched to the channels": lambda m, x: F.conv2d(
        x, m.parts.one.view(1, 1, 1, 1).expand(x.shape[1], 1, 2, 2), groups=x.shape[1]
    ),
    "sum over heads and widths": lambda m, x: (
        x * x.relu().view(2, m.half, -1, 4, 6).sum((1, 2))[:, None]
    ),
    "sum over widths": lambda m, x: widths_gated(x.relu().view(2, m.half, -1, 4, 6)),
}

STAYS: dict[str, tuple[Callable[..., Tensor], str]] = {
    "windows before channels": (
        lambda m, x: F.unfold(x, 3, padding=1).view(2, 9, x.shape[1], 4, 6)[:, 4],
        "",
    ),
    "unfold of channels": (lambda m, x: x.unfold(1, 2, 2)[..., 0], "a window slides"),
    "unfold of channels from the end": (lambda m, x: x.unfold(-3, 2, 2)[..., 0], "window slides"),
    "Fourier over channels": (lambda m, x: torch.fft.fft(x, dim=1).real, "Fourier"),
    "Fourier over channels from the end": (lambda m, x: torch.fft.ifft(x, dim=-3).imag, "Fourier"),
    "Fourier over everything": (lambda m, x: torch.fft.fftn(x).real, "Fourier"),
    "channels as pairs": (
        lambda m, x: (
            torch.view_as_complex(x.permute(0, 2, 3, 1).reshape(2, 4, 6, 4, 2).contiguous())
            .abs()
            .permute(0, 3, 1, 2)
            + x[:, :4]
        ),
        "",
    ),
}

NORMALISED: dict[str, Callable[..., Tensor]] = {
    "sum of windows over channels": lambda m, x: x * F.unfold(x, (4, 6)).sum(1)[..., None, None],
    "baddbmm of what is not zero": lambda m, x: product(x.sigmoid()),
    "sum of sigmoids seen as heads": lambda m, x: (
        x * x.sigmoid().view(2, 2, -1, 4, 6).sum((1, 2))[:, None]
    ),
}

NEEDED = {
    "im2col": "aten::im2col",
    "im2col and back": "aten::col2im",
    "unfold": "aten::unfold",
    "Fourier and back": "aten::_fft_c2r",
    "magnitudes": "aten::_fft_c2c",
    "real and imaginary parts": "aten::_fft_r2c",
    "pairs as channels": "aten::view_as_real",
    "pairs of rows turned": "aten::view_as_complex",
    "complex from two": "aten::complex",
    "baddbmm": "aten::baddbmm",
}


@pytest.mark.parametrize("name", PASSES)
def test_passes(name: str) -> None:
    assert_passes(PASSES[name])


@pytest.mark.parametrize("name", STAYS)
def test_stays(name: str) -> None:
    assert_stays(*STAYS[name])


@pytest.mark.parametrize("name", NORMALISED)
def test_normalises(name: str) -> None:
    assert_normalises(NORMALISED[name])


@pytest.mark.parametrize("name", NEEDED)
def test_is_needed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_needed(PASSES[name], NEEDED[name], monkeypatch)


@pytest.mark.parametrize("cut", ["chunk", "tensor_split"])
def test_unequal_pieces(cut: str) -> None:
    """Eight channels in three pieces: the first two stay equal, and the last is never larger."""
    model, images = between(
        lambda m, x: torch.cat(
            [piece * k for k, piece in enumerate(getattr(x, cut)(3, 1), start=1)][::-1], 1
        )
    )
    plan = cpx.plan(model, images, 0.5)
    kept = len(plan.kept["a.weight"][0])
    assert 3 <= kept <= 6
    assert not any("the pruned model" in f.why for f in plan.frozen)
    pieces = [[0, 1, 2], [3, 4, 5], [6, 7]]
    counts = [sum(i in p for i in plan.kept["a.weight"][0].tolist()) for p in pieces]
    assert counts == [len(p) for p in getattr(torch.arange(kept), cut)(3)]
    error = relative_error(run(plan.apply(model), images), run(zeroed(model, plan), images))
    assert error < 1e-9


def test_regions_of_images_keep_their_channels_apart() -> None:
    """Boxes cut out of maps: channels pass, positions and boxes stay."""
    from torchvision.ops import roi_align, roi_pool

    boxes = torch.tensor([[0.0, 0, 0, 3, 3], [1.0, 1, 0, 5, 3], [1.0, 0, 0, 2, 2]])
    for cut in (roi_align, roi_pool):
        model, images = between(lambda m, x, cut=cut: cut(x, boxes.to(x), (2, 2)))
        plan = cpx.plan(model, images, 0.5)
        assert plan.kept["a.weight"][0].shape == (4,)
        error = relative_error(run(plan.apply(model), images), run(zeroed(model, plan), images))
        assert error < 1e-9


class Grouped(nn.Module):
    """Rows go in order to three matrices of one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 16)
        self.experts = nn.Parameter(torch.randn(3, 16, 24) / 4)
        self.b = nn.Linear(24, 8)
        self.register_buffer("ends", torch.tensor([16, 32, 48], dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu().to(torch.bfloat16)
        x = torch._grouped_mm(x, self.experts.to(torch.bfloat16), offs=self.ends)
        return self.b(x.to(self.b.weight.dtype))


def test_grouped_products() -> None:
    """Both sides of the product shrink; which expert a row goes to stays. Half precision inside."""
    torch.manual_seed(0)
    model, x = Grouped().eval(), torch.randn(48, 8)
    plan = cpx.plan(model, x, 0.5, round_to=8)
    assert plan.kept["experts"].keys() == {1, 2}
    assert torch.equal(plan.kept["experts"][1], plan.kept["a.weight"][0])
    assert torch.equal(plan.kept["experts"][2], plan.kept["b.weight"][1])
    error = relative_error(run(plan.apply(model), x), run(zeroed(model, plan), x))
    assert error < 1e-2
