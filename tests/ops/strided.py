"""Tensors of drawn shape, dtype and strides, shared by the operator tests."""

from __future__ import annotations

from typing import Literal

import torch
from hypothesis import strategies as st
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

Layout = Literal["contiguous", "channels_last", "sliced", "permuted", "offset", "expanded"]
LAYOUTS: tuple[Layout, ...] = (
    "contiguous",
    "channels_last",
    "sliced",
    "permuted",
    "offset",
    "expanded",
)

# 0 and 1 are edge cases; 3, 5, 9 leave a remainder beside every vector width; 8, 16 are aligned; 33
# crosses from the column walk to the row walk of the norms.
SIZES = st.sampled_from([0, 1, 2, 3, 5, 8, 9, 16, 33])


def shapes(min_dims: int, max_dims: int) -> st.SearchStrategy[list[int]]:
    """Shapes of a few hundred elements, empty ones included."""
    return st.lists(SIZES, min_size=min_dims, max_size=max_dims).filter(
        lambda sizes: torch.Size(sizes).numel() <= 20_000
    )


def strided(base: Tensor, layout: Layout) -> Tensor:
    """A tensor equal to `base` whose strides are of the given kind, as far as its dims allow."""
    if layout == "channels_last" and base.dim() in (4, 5):
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        return base.contiguous(memory_format=formats[base.dim()])
    if layout == "sliced" and base.dim() > 0:  # every other element of a larger tensor
        larger = base.new_zeros([2 * size + 1 for size in base.shape])
        view = larger[tuple(slice(1, None, 2) for _ in base.shape)]
        return view.copy_(base)
    if layout == "permuted":  # stored in reverse order of dims
        order = list(range(base.dim() - 1, -1, -1))
        return base.permute(order).contiguous().permute(order)
    if layout == "offset":  # starts on no 16-byte boundary
        larger = base.new_zeros(base.numel() + 1)
        return larger[1:].view(base.shape).copy_(base)
    if layout == "expanded" and base.dim() > 0 and base.shape[0] > 0:  # stride 0, values repeated
        return base[:1].expand(base.shape)
    return base.contiguous()


def values(shape: list[int], dtype: torch.dtype, seed: int) -> Tensor:
    """Normal values of any dtype; integers and booleans come from the same numbers."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(shape, generator=generator, dtype=torch.float64)
    if dtype == torch.bool:
        return normal > 0
    if dtype.is_floating_point or dtype.is_complex:
        return normal.to(dtype)
    return (normal * 50).to(dtype)
