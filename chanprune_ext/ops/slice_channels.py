"""Keeps chosen indices of dims 0 and 1 of many tensors in one pass over the data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch._C import _AutoDispatchBelowAutograd

from chanprune_ext.errors import InvalidArgumentError
from chanprune_ext.ops._loader import (
    CPU_MODULE,
    differentiates,
    inside_transform,
    native_available,
)
from chanprune_ext.ops.tensor_checks import check_dense, check_is_tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["slice_channels", "slice_channels_reference"]

_OPS = torch.ops.chanprune


def _check_index(name: str, i: int, index: Tensor, tensor: Tensor, dim: int) -> None:
    """Checks what is known without reading values."""
    check_is_tensor(f"{name}[{i}]", index)
    if tensor.dim() <= dim:
        raise InvalidArgumentError(
            f"{name}[{i}] selects along dim {dim}, but tensors[{i}] has shape "
            f"{tuple(tensor.shape)}; pass None there"
        )
    if index.dim() != 1 or index.dtype not in (torch.int64, torch.int32):
        raise InvalidArgumentError(
            f"{name}[{i}] should be a one-dimensional int64 tensor of kept indices, "
            f"got {index.dtype} of shape {tuple(index.shape)}"
        )


def _check_indices(name: str, indices: Sequence[Tensor | None], tensors: Sequence[Tensor]) -> None:
    dim = 0 if name == "rows" else 1
    for i, (index, tensor) in enumerate(zip(indices, tensors, strict=True)):
        if index is not None:
            _check_index(name, i, index, tensor, dim)


def _check_values(
    name: str, indices: Sequence[Tensor | None], tensors: Sequence[Tensor], dim: int
) -> None:
    """Raises for the first index outside its tensor; reads every value."""
    for i, (index, tensor) in enumerate(zip(indices, tensors, strict=True)):
        if index is None or index.numel() == 0:
            continue
        low, high, size = int(index.min()), int(index.max()), tensor.shape[dim]
        if low < 0 or high >= size:
            raise InvalidArgumentError(
                f"{name}[{i}] should hold indices in [0, {size}) of tensors[{i}] of shape "
                f"{tuple(tensor.shape)}, got {low if low < 0 else high}"
            )


def _is_ready(index: Tensor | None) -> bool:
    return index is None or (
        isinstance(index, torch.Tensor) and index.dtype is torch.int64 and index.is_cpu
    )


def _normalise(
    name: str, indices: Sequence[Tensor | None], tensors: Sequence[Tensor], dim: int
) -> list[Tensor | None]:
    if len(indices) != len(tensors):
        raise InvalidArgumentError(
            f"{name} should hold one entry per tensor, got {len(indices)} for "
            f"{len(tensors)} tensors"
        )
    if all(map(_is_ready, indices)):
        return list(indices)  # the usual case, whose other properties the kernel checks
    lists: list[Tensor | None] = []
    for i, (index, tensor) in enumerate(zip(indices, tensors, strict=True)):
        if index is not None:
            _check_index(name, i, index, tensor, dim)
            if index.dtype != torch.int64 or not index.is_cpu:
                # Index lists are checked on the host, whatever the device of the tensors.
                index = index.to("cpu", torch.int64)
        lists.append(index)
    return lists


def slice_channels(
    tensors: Sequence[Tensor],
    rows: Sequence[Tensor | None],
    cols: Sequence[Tensor | None],
) -> list[Tensor]:
    """``t[rows][:, cols]`` for every tensor, in one call and one pass over the data.

    Bit-exact for every dtype. Results own fresh memory and keep the memory format: channels_last
    stays channels_last, anything else becomes contiguous. Indices may repeat and come in any order;
    as in ``torch.index_select``, negative ones are refused. Differentiable any number of times.
    Inside the transforms of torch.func `slice_channels_reference` runs instead.

    Args:
        tensors (Sequence[Tensor[N, M, ...]]): weights, biases, buffers, gradients, optimizer state;
            any dtype and strides, one device.
        rows (Sequence[Tensor[R] | None]): int64 indices kept along dim 0, or None to keep all. Best
            on the CPU: indices on another device are copied there, which waits for that device.
        cols (Sequence[Tensor[C] | None]): likewise along dim 1.

    Returns:
        list[Tensor[R, C, ...]]: one per tensor, dtype and device unchanged.

    Raises:
        InvalidArgumentError: an argument is not as described or an index is out of range; nothing
            is allocated or copied then.
    """
    tensors = list(tensors)
    row_lists = _normalise("rows", rows, tensors, 0)
    col_lists = _normalise("cols", cols, tensors, 1)
    if not tensors:
        return []
    compiling = torch.compiler.is_compiling()
    native = native_available(tensors[0]) and (compiling or not inside_transform())
    if not native or compiling or tensors[0].is_meta:
        _check_tensors(tensors)
        _check_indices("rows", row_lists, tensors)
        _check_indices("cols", col_lists, tensors)
        if native:
            return list(_OPS.slice_channels(tensors, row_lists, col_lists))
        if not inside_transform():
            _check_all(row_lists, col_lists, tensors)
        return slice_channels_reference(tensors, row_lists, col_lists)
    try:
        results: list[Tensor]
        if differentiates(tensors):
            results = _OPS.slice_channels.default(tensors, row_lists, col_lists)
        else:
            with _AutoDispatchBelowAutograd():  # past the registered gradient, which is Python
                results = _OPS.slice_channels.default(tensors, row_lists, col_lists)
        return results
    except RuntimeError:
        # The kernel checks every index before it copies; the culprit is named only on failure.
        _check_tensors(tensors)
        _check_all(row_lists, col_lists, tensors)
        raise


def _check_tensors(tensors: Sequence[Tensor]) -> None:
    for i, tensor in enumerate(tensors):
        check_dense(f"tensors[{i}]", tensor)
        if tensor.device != tensors[0].device:
            raise InvalidArgumentError(
                f"all tensors should be on one device, got {tensors[0].device} for tensors[0] and "
                f"{tensor.device} for tensors[{i}]; move them or call once per device"
            )


def _check_all(
    rows: Sequence[Tensor | None], cols: Sequence[Tensor | None], tensors: Sequence[Tensor]
) -> None:
    _check_indices("rows", rows, tensors)
    _check_indices("cols", cols, tensors)
    _check_values("rows", rows, tensors, 0)
    _check_values("cols", cols, tensors, 1)


def slice_channels_reference(
    tensors: Sequence[Tensor],
    rows: Sequence[Tensor | None],
    cols: Sequence[Tensor | None],
) -> list[Tensor]:
    """`slice_channels` in plain torch: fallback, test oracle and benchmark baseline."""
    results = []
    for tensor, row, col in zip(tensors, rows, cols, strict=True):
        result = tensor
        if row is not None:
            result = result.index_select(0, row.to(tensor.device))
        if col is not None:
            result = result.index_select(1, col.to(tensor.device))
        strides = _packed_strides(list(result.shape), _is_channels_last(tensor))
        # Made from the result, so that under vmap it has the dim that vmap hides.
        results.append(result.new_empty_strided(result.shape, strides).copy_(result))
    return results


def _is_channels_last(tensor: Tensor) -> bool:
    """Reads ambiguous strides as torch does, so that results get the format it would suggest."""
    if tensor.dim() not in (4, 5) or tensor.stride(1) == 0:
        return False
    floor = 0
    for dim in (1, *range(tensor.dim() - 1, 1, -1), 0):
        size, stride = tensor.shape[dim], tensor.stride(dim)
        if size == 0 or stride < floor or (dim == 0 and floor == tensor.stride(1)):
            return False
        floor = stride * max(size, 1)
    return True


def _packed_strides(sizes: list[int], channels_last: bool) -> list[int]:
    order = list(range(len(sizes) - 1, -1, -1))
    if channels_last:
        order.remove(1)
        order.insert(0, 1)
    strides = [0] * len(sizes)
    step: Any = 1  # a torch.SymInt where the fake kernel knows no number of a size
    for dim in order:
        strides[dim] = step
        step *= torch.sym_max(sizes[dim], 1)
    return strides


def _fake(
    tensors: list[Tensor], rows: list[Tensor | None], cols: list[Tensor | None]
) -> list[Tensor]:
    results = []
    for tensor, row, col in zip(tensors, rows, cols, strict=True):
        sizes = list(tensor.shape)
        if row is not None:
            sizes[0] = row.shape[0]
        if col is not None:
            sizes[1] = col.shape[0]
        strides = _packed_strides(sizes, _is_channels_last(tensor))
        results.append(tensor.new_empty_strided(sizes, strides))
    return results


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:  # noqa: ARG001
    tensors, rows, cols = inputs
    ctx.sizes = [tensor.shape for tensor in tensors]
    ctx.has_index = [index is not None for index in (*rows, *cols)]
    ctx.save_for_backward(*(index for index in (*rows, *cols) if index is not None))


def _no_gradient(indices: list[Tensor | None]) -> list[None] | None:
    """None in the form that register_autograd wants: per tensor only where all are tensors."""
    return None if any(index is None for index in indices) else [None] * len(indices)


def _backward(
    ctx: Any, grads: list[Tensor | None]
) -> tuple[list[Tensor | None], list[None] | None, list[None] | None]:
    saved = iter(ctx.saved_tensors)
    indices = [next(saved) if present else None for present in ctx.has_index]
    count = len(ctx.sizes)
    results: list[Tensor | None] = []
    for size, grad, row, col in zip(
        ctx.sizes, grads, indices[:count], indices[count:], strict=True
    ):
        if grad is None:
            results.append(None)
            continue
        # Adds, so that repeated indices collect the gradients of all their copies.
        if col is not None:
            wide = grad.new_zeros((grad.shape[0], *size[1:]))
            grad = wide.index_add(1, col.to(grad.device), grad)
        if row is not None:
            grad = grad.new_zeros(size).index_add(0, row.to(grad.device), grad)
        results.append(grad)
    return results, _no_gradient(indices[:count]), _no_gradient(indices[count:])


if CPU_MODULE.loaded:
    torch.library.register_fake("chanprune::slice_channels", _fake)
    torch.library.register_autograd(
        "chanprune::slice_channels", _backward, setup_context=_setup_context
    )
