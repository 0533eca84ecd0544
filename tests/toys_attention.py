"""Attention and sequence networks as people write them."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toy_registry import TOYS, Head, Toy, block, images, toy


def _tokens(*shape: int) -> Any:
    return lambda: torch.randint(0, 20, shape)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


class _Root(nn.Module):
    """RMS norm written out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class _GroupedQueryLayer(nn.Module):
    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = 4, 2, 8
        self.q = nn.Linear(24, 32, bias=False)
        self.k, self.v = nn.Linear(24, 16, bias=False), nn.Linear(24, 16, bias=False)
        self.o = nn.Linear(32, 24, bias=False)
        self.gate, self.up = nn.Linear(24, 40, bias=False), nn.Linear(24, 40, bias=False)
        self.down = nn.Linear(40, 24, bias=False)
        self.norm1 = _Root(24) if norm else nn.Identity()
        self.norm2 = _Root(24) if norm else nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        n, t, _ = x.shape
        y = self.norm1(x)
        q = self.q(y).view(n, t, self.heads, self.head_dim).transpose(1, 2)
        k = self.k(y).view(n, t, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v(y).view(n, t, self.kv_heads, self.head_dim).transpose(1, 2)
        q, k = _rotated(q, cos, sin), _rotated(k, cos, sin)
        repeats = self.heads // self.kv_heads
        k, v = (
            z[:, :, None]
            .expand(n, z.shape[1], repeats, t, z.shape[3])
            .reshape(n, -1, t, z.shape[3])
            for z in (k, v)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)
        x = x + self.o(y.transpose(1, 2).reshape(n, t, -1))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class _Decoder(nn.Module):
    """Grouped queries, rotary positions and an output layer tied to the embedding."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 24)
        self.layers = nn.ModuleList(_GroupedQueryLayer(norm) for _ in range(2))
        self.norm = _Root(24) if norm else nn.Identity()
        self.head = nn.Linear(24, 20, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("frequency", 10.0 ** -torch.linspace(0, 1, 4), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device).to(self.frequency)
        angles = torch.outer(positions, self.frequency)
        angles = torch.cat((angles, angles), -1)
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, angles.cos(), angles.sin())
        return self.head(self.norm(x))


for _name, _norm in (("DecoderWithoutNorms", False), ("Decoder", True)):
    TOYS[_name] = Toy(
        _name,
        lambda norm=_norm: _Decoder(norm),
        _tokens(2, 7),
        expects="normalised" if _norm else "exact",
        also_kept=("an embedding table is indexed by token id",),
    )


@toy(inputs=images(2, 7, 5))
class PackedMultiQuery(nn.Module):
    """All queries and the one key and value in one layer, picked apart by position (Falcon)."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.head_dim = 4, 6
        self.stem = nn.Linear(5, 20)
        self.qkv = nn.Linear(20, 6 * 6)
        self.dense = nn.Linear(24, 20)
        self.out = nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.stem(x))
        n, t, _ = x.shape
        fused = self.qkv(x).view(n, t, self.heads + 2, self.head_dim)
        q, k, v = fused[..., :-2, :], fused[..., [-2], :], fused[..., [-1], :]
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))
        scores = (q @ k.transpose(-1, -2) / math.sqrt(self.head_dim)).softmax(-1)
        y = (scores @ v).transpose(1, 2).reshape(n, t, self.heads * self.head_dim)
        return self.out(x + self.dense(y))


class _WindowAttention(nn.Module):
    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.scale = (width // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.table = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads))
        places = torch.stack(
            torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
        ).flatten(1)
        apart = (places[:, :, None] - places[:, None]).permute(1, 2, 0) + window - 1
        self.register_buffer("index", apart[..., 0] * (2 * window - 1) + apart[..., 1])

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        b, t, c = x.shape
        qkv = self.qkv(x).reshape(b, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        scores = (q * self.scale) @ k.transpose(-2, -1)
        bias = self.table[self.index.view(-1)].view(t, t, -1).permute(2, 0, 1)
        scores = scores + bias[None]
        windows = mask.shape[0]
        scores = scores.view(b // windows, windows, -1, t, t) + mask[None, :, None]
        scores = scores.view(b, -1, t, t).softmax(-1)
        return self.proj((scores @ v).transpose(1, 2).reshape(b, t, c))


@toy(inputs=images(2, 3, 8, 8))
class ShiftedWindows(nn.Module):
    """Attention in rolled windows with a table of relative positions and a mask (Swin)."""

    def __init__(self) -> None:
        super().__init__()
        self.window, self.shift = 4, 2
        self.stem = nn.Conv2d(3, 24, 1)
        self.attention = _WindowAttention(24, 4, 4)
        self.fc1, self.fc2 = nn.Linear(24, 48), nn.Linear(48, 24)
        self.head = Head(24)

    def _partition(self, x: Tensor) -> Tensor:
        n, h, w, c = x.shape
        k = self.window
        x = x.view(n, h // k, k, w // k, k, c).permute(0, 1, 3, 2, 4, 5)
        return x.reshape(-1, k * k, c)

    def _mask(self, x: Tensor) -> Tensor:
        regions = x.new_zeros((1, *x.shape[1:3], 1))
        cuts = (slice(0, -self.window), slice(-self.window, -self.shift), slice(-self.shift, None))
        for i, rows in enumerate(cuts):
            for j, columns in enumerate(cuts):
                regions[:, rows, columns, :] = 3 * i + j
        regions = self._partition(regions).squeeze(-1)
        apart = regions[:, None] - regions[:, :, None]
        return apart.masked_fill(apart != 0, -100.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        n, h, w, c = x.shape
        k = self.window
        y = torch.roll(x, (-self.shift, -self.shift), (1, 2))
        y = self.attention(self._partition(y), self._mask(y))
        y = y.view(n, h // k, w // k, k, k, c).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, c)
        x = x + torch.roll(y, (self.shift, self.shift), (1, 2))
        x = x + self.fc2(F.gelu(self.fc1(x)))
        return self.head(x.permute(0, 3, 1, 2))


@toy(inputs=images(2, 7, 6))
class BothDirections(nn.Module):
    """Two layers of an LSTM and a GRU read forwards and backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(6, 16)
        self.lstm = nn.LSTM(16, 6, num_layers=2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(12, 5, bidirectional=True, batch_first=True)
        self.fc = nn.Linear(20, 12)
        self.out = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.lstm(F.relu(self.read(x)))
        y, last = self.gru(y)
        both = torch.cat([y.mean(1), last.transpose(0, 1).flatten(1)], 1)
        return self.out(F.relu(self.fc(both)))


class _BiasedLayer(nn.Module):
    """Attention with a bias from outside; heads and inner width are attributes (T5)."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.width = 4, 6
        self.inner = self.heads * self.width
        self.q, self.k, self.v = (nn.Linear(16, self.inner, bias=False) for _ in range(3))
        self.o = nn.Linear(self.inner, 16, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = (
            layer(x).view(n, t, self.heads, self.width).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        weights = F.softmax(torch.matmul(q, k.transpose(3, 2)) + bias, -1)
        y = torch.matmul(weights, v).transpose(1, 2).contiguous().view(n, t, self.inner)
        return x + self.o(y)


@toy(inputs=images(2, 7, 5))
class BiasSharedByLayers(nn.Module):
    """One table of relative positions adds to the scores of every layer: their heads are tied."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 16)
        self.table = nn.Embedding(13, 4)
        self.layers = nn.ModuleList(_BiasedLayer() for _ in range(2))
        self.out = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        t = x.shape[1]
        places = torch.arange(t, device=x.device)
        bias = self.table(places[:, None] - places[None] + t - 1).permute(2, 0, 1)[None]
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x, bias)
        return self.out(x)


@toy()
class CachedBias(nn.Module):
    """In eval mode a bias gathered from a parameter is kept for the next run (LeViT)."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.key_dim, self.value_dim = 4, 4, 8
        self.stem = block(3, 16)
        self.qkv = nn.Linear(16, 4 * 16)
        self.proj = nn.Linear(32, 16)
        self.biases = nn.Parameter(torch.randn(4, 64))
        places = torch.arange(64)
        self.register_buffer("places", (places[:, None] - places[None]).abs(), persistent=False)
        self.cache: dict[str, Tensor] = {}
        self.head = Head(16)

    def train(self, mode: bool = True) -> CachedBias:
        super().train(mode)
        self.cache.clear()
        return self

    def _bias(self, x: Tensor) -> Tensor:
        if self.training:
            return self.biases[:, self.places]
        key = str(x.device)
        if key not in self.cache:
            self.cache[key] = self.biases[:, self.places]
        return self.cache[key]

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        n, _, h, w = x.shape
        x = x.flatten(2).transpose(1, 2)
        q, k, v = (
            self.qkv(x)
            .view(n, h * w, self.heads, -1)
            .split([self.key_dim, self.key_dim, self.value_dim], 3)
        )
        q, k, v = q.transpose(1, 2), k.permute(0, 2, 3, 1), v.transpose(1, 2)
        scores = (q @ k * 0.5 + self._bias(x)).softmax(-1)
        y = (scores @ v).transpose(1, 2).reshape(n, h * w, -1)
        x = x + self.proj(F.hardswish(y))
        return self.head(x.transpose(1, 2).reshape(n, -1, h, w))


@toy(inputs=_tokens(2, 9))
class BagsOfTokens(nn.Module):
    """Sums of token vectors, each token weighted by a parameter of its own place."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(20, 16, mode="sum")
        self.largest = nn.EmbeddingBag(20, 16, mode="max")
        self.places = nn.Parameter(torch.rand(9))
        self.fc, self.out = nn.Linear(32, 24), nn.Linear(24, 3)

    def forward(self, ids: Tensor) -> Tensor:
        words = self.words(ids, per_sample_weights=self.places.expand(ids.shape[0], -1))
        return self.out(F.relu(self.fc(torch.cat([words, self.largest(ids)], 1))))


@toy(inputs=images(2, 3, 20), also_kept=("channels meet others that cannot be removed",))
class LearntAlignment(nn.Module):
    """A network predicts a matrix that points are multiplied by (PointNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.k = 3
        self.a, self.fc = nn.Conv1d(3, 24, 1), nn.Linear(24, 9)
        self.b, self.c = nn.Conv1d(3, 16, 1), nn.Conv1d(16, 24, 1)
        self.out = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        identity = torch.eye(self.k, device=x.device, dtype=x.dtype)
        align = self.fc(F.relu(self.a(x)).amax(2)).view(-1, self.k, self.k) + identity
        x = torch.bmm(x.transpose(2, 1), align).transpose(2, 1)
        return self.out(F.relu(self.c(F.relu(self.b(x)))).amax(2))


@toy(inputs=lambda: (torch.randn(9, 5), torch.randint(0, 9, (2, 30))))
class MessagePassing(nn.Module):
    """Messages gathered from one end of every edge and summed at the other."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(5, 16)
        self.layers = nn.ModuleList(nn.Linear(32, 16) for _ in range(2))
        self.out = nn.Linear(16, 3)

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        source, target = edges
        x = F.relu(self.read(nodes))
        for layer in self.layers:
            message = layer(torch.cat([x[source], x.index_select(0, target)], -1))
            total = torch.zeros_like(x).index_add_(0, target, F.relu(message))
            most = x.new_full((x.shape[0], x.shape[1]), 0.0).scatter_reduce(
                0, target[:, None].expand_as(message), message, "amax"
            )
            x = x + total + most
        return self.out(x)


@toy(inputs=images(2, 6, 5), also_kept=("every channel depends on all others",))
class Experts(nn.Module):
    """Every token goes to its best two experts, the results are written back by position."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 16)
        self.router = nn.Linear(16, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16)) for _ in range(3)
        )
        self.out = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        flat = x.reshape(-1, x.shape[-1])
        weights, chosen = self.router(flat).softmax(-1).topk(2, -1)
        result = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, place = torch.where(chosen == number)
            result.index_add_(0, token, expert(flat[token]) * weights[token, place, None])
        return self.out(x + result.view_as(x))
