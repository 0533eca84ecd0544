"""Hints from a measurement: which widths sit badly, and what else keeps a network from its speed.

Matrix units and vector registers work on blocks of channels: a width between two multiples costs
as much as the larger one, often more, where a remainder takes a slower path. A block is 8 half
precision numbers on a GPU's matrix unit, and one vector register of float32 on a CPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .module_times import ModuleTime

__all__ = ["advice", "block_of", "misfits"]

_SHARE = 0.02  # a layer below this share of the time is not worth a hint
_SHOWN = 5


def block_of(device: torch.device) -> int:
    """Channels that the device computes together."""
    if device.type == "cpu":
        capability = torch.backends.cpu.get_cpu_capability()
        return 16 if "AVX512" in capability else 8
    return 8


def misfits(times: Sequence[ModuleTime], block: int) -> list[ModuleTime]:
    """Layers that take time and whose widths are no multiples of the block, longest first.

    Widths below one block, such as three colours, and those of an output layer are as they are.
    """
    total = sum(t.milliseconds for t in times) or 1.0
    layers = [t for t in times if t.widths is not None]
    found = [
        t
        for t in layers[:-1]
        if t.milliseconds / total >= _SHARE
        and any(width > block and width % block for width in t.widths or ())
    ]
    return sorted(found, key=lambda t: -t.milliseconds)


def advice(
    original: Sequence[ModuleTime],
    pruned: Sequence[ModuleTime],
    device: torch.device,
    *,
    macs_ratio: float | None,
    time_ratio: float,
    channels_last: bool,
) -> list[str]:
    """What to change, one sentence each; empty where nothing sits badly.

    Args:
        original: Times of the original's modules.
        pruned: Times of the pruned model's modules.
        device: Where they were measured.
        macs_ratio: Multiply-accumulates of the pruned model over those of the original, if known.
        time_ratio: Time of the pruned model over that of the original.
        channels_last: The weights of convolutions are stored with channels last.
    """
    hints: list[str] = []
    block = block_of(device)
    odd = misfits(pruned, block)
    if odd:
        named = ", ".join(
            f"{t.name} ({t.widths[0]} -> {t.widths[1]})" for t in odd[:_SHOWN] if t.widths
        )
        more = f" and {len(odd) - _SHOWN} more" if len(odd) > _SHOWN else ""
        hints.append(
            f"{len(odd)} layers have widths that are no multiples of {block}, the block this "
            f"device computes together: {named}{more}. Plan again with round_to={block}."
        )
    before, after = _other(original), _other(pruned)
    if after > 0.4:
        hints.append(
            f"{after:.0%} of the pruned network's time ({before:.0%} of the original's) is spent "
            f"outside convolutions and linear layers: normalisation, activations, additions. They "
            f"shrink with the residual streams and not with the channels inside blocks; "
            f"torch.compile or onnxruntime join them with the layers before."
        )
    slow = sorted(_unchanged(original, pruned), key=lambda t: -t.milliseconds)
    share = sum(t.milliseconds for t in slow) / (sum(t.milliseconds for t in pruned) or 1.0)
    if share > 0.25:
        named = ", ".join(t.name or "the model itself" for t in slow[:_SHOWN])
        hints.append(
            f"{share:.0%} of the time is in layers that have kept their widths: {named}. "
            f"chanprune inspect says what keeps them."
        )
    if macs_ratio is not None and time_ratio > 1.25 * macs_ratio and not channels_last:
        convolutions = any(t.kind.startswith("Conv") for t in pruned)
        if convolutions:
            hints.append(
                "The time has fallen less than the multiply-accumulates. Convolutions are often "
                "faster with model.to(memory_format=torch.channels_last) and inputs likewise: "
                "measure with --channels-last."
            )
    return hints


def _other(times: Sequence[ModuleTime]) -> float:
    total = sum(t.milliseconds for t in times) or 1.0
    return sum(t.milliseconds for t in times if t.widths is None) / total


def _unchanged(original: Sequence[ModuleTime], pruned: Sequence[ModuleTime]) -> list[ModuleTime]:
    widths = {t.name: t.widths for t in original}
    return [t for t in pruned if t.widths is not None and widths.get(t.name) == t.widths]
