"""Names of devices, waiting for them, and which tensors are on which."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

__all__ = ["by_device", "cpu_name", "device_name", "synchroniser"]


def by_device(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Positions of the tensors of each device; a large model may be spread over several."""
    found: dict[torch.device, list[int]] = {}
    for position, tensor in enumerate(tensors):
        found.setdefault(tensor.device, []).append(position)
    return list(found.values())


def device_name(device: torch.device) -> str:
    """What the device is sold as, where the system tells it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_name() if device.type == "cpu" else device.type


def cpu_name() -> str:
    """The processor's marketing name where the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def synchroniser(device: torch.device) -> Callable[[], object]:
    """A function that waits until the device has done all it was given; nothing on a CPU."""
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    if device.type in ("mps", "xpu"):
        return lambda: torch.accelerator.synchronize(device)
    return _do_nothing


def _do_nothing() -> None:
    """Stands in for the synchronisation that only accelerators need."""
