"""Batch norm that averages over all processes, for as long as a run lasts."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

__all__ = ["synchronised_batch_norm"]

_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@contextmanager
def synchronised_batch_norm(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Puts ``nn.SyncBatchNorm`` in the place of every batch norm, with the same tensors.

    On exit the modules themselves are back in their places.

    Raises:
        InvalidArgumentError: the device is no GPU, or a batch norm is of a class of its own.
    """
    if device.type != "cuda":
        raise InvalidArgumentError(
            f"sync_batch_norm: torch's SyncBatchNorm needs CUDA, the run is on '{device.type}'; "
            "leave it out there"
        )
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.modules.batchnorm._BatchNorm)
        and not isinstance(child, nn.SyncBatchNorm)
    ]
    for _, name, child in places:
        hooked = child._forward_hooks or child._forward_pre_hooks  # noqa: SLF001 - no public name
        if type(child) not in _PLAIN or hooked:
            raise InvalidArgumentError(
                f"sync_batch_norm: '{name}' is a {type(child).__name__}, expected a plain "
                "nn.BatchNorm without hooks, whose place SyncBatchNorm can take; leave it out"
            )
    for parent, name, child in places:
        synchronised: Any = nn.SyncBatchNorm
        setattr(parent, name, synchronised.convert_sync_batchnorm(child))
    try:
        yield
    finally:
        for parent, name, child in places:
            used = getattr(parent, name)
            for buffer, value in used.named_buffers(recurse=False):
                setattr(child, buffer, value)  # moving to another device may have put new ones
            setattr(parent, name, child)
