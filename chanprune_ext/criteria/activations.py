"""Criteria on what the channels carry: statistics of activations on unlabelled data."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from chanprune_ext.analysis.calls import run_model, tensors_in
from chanprune_ext.analysis.stand_ins import tensors_of
from chanprune_ext.compensation.batches import read_batches
from chanprune_ext.errors import InvalidArgumentError
from chanprune_ext.module_modes import evaluating

from .magnitude import l1
from .members import Scores, joined, normalised

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from chanprune_ext.analysis import CouplingGroup
    from chanprune_ext.analysis.groups import Member

__all__ = ["activation", "fluctuation"]

STATISTICS = ("mean", "std", "apoz")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def activation(
    batches: Any, statistic: str = "mean"
) -> Callable[[nn.Module, Sequence[CouplingGroup], int], Scores]:
    """A criterion: a statistic of each channel where the next layers read it.

    Args:
        batches: Calibration data as for :func:`chanprune_ext.compensate`; labels are ignored.
        statistic: ``"mean"`` of the absolute values; their ``"std"``; or ``"apoz"``, the share of
            values that are not zero (Hu et al. 2016, "Network Trimming", score the average
            percentage of zeros, low = keep).

    Returns:
        A function for the ``criterion`` argument of :func:`chanprune_ext.plan`. Several readers are
        each normalised to mean 1 and averaged. A group that no plain convolution or linear layer
        reads is ranked by the L1 norm.

    Raises:
        InvalidArgumentError: There is no such statistic.
    """
    if statistic not in STATISTICS:
        raise InvalidArgumentError(
            f"statistic must be one of {', '.join(STATISTICS)}, got {statistic!r}"
        )

    def score(inputs: _Moments, weight: Tensor) -> np.ndarray:
        return inputs.statistic(statistic)

    criterion = _on_readers(batches, score)
    criterion.__name__ = f"activation({statistic})"
    return criterion


def fluctuation(batches: Any) -> Callable[[nn.Module, Sequence[CouplingGroup], int], Scores]:
    """A criterion: how much the next layers' outputs move with a channel (An et al. 2024, FLAP).

    ``score_u = sum over readers of Var[x_u] |W_u|^2``: the squared error at the reader's output
    when the channel is replaced by its mean, which compensation adds to the bias. Readers are each
    normalised to mean 1.

    Args:
        batches: Calibration data as for :func:`chanprune_ext.compensate`; labels are ignored.

    Returns:
        A function for the ``criterion`` argument of :func:`chanprune_ext.plan`. A group that no
        plain convolution or linear layer reads is ranked by the L1 norm.
    """

    def score(inputs: _Moments, weight: Tensor) -> np.ndarray:
        energy = weight.abs().double().square().transpose(0, 1).flatten(1).sum(1).cpu().numpy()
        return np.asarray(inputs.statistic("std") ** 2 * energy)

    criterion = _on_readers(batches, score)
    criterion.__name__ = "fluctuation"
    return criterion


class _Moments:
    """Sums over samples and positions of a layer's inputs, one value a channel, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: Tensor | None = None

    def add(self, values: Tensor, channel_dim: int) -> None:
        """Adds one batch; ``values`` as the layer is given them."""
        rows = values.detach().movedim(channel_dim, 0).flatten(1)
        rows = rows.to(torch.complex128 if rows.is_complex() else torch.float64)
        sizes = rows.abs()
        # A sum of complex values makes the others complex too, with an imaginary part of zero.
        found = torch.stack(
            [rows.sum(1), sizes.sum(1), sizes.square().sum(1), rows.count_nonzero(1).double()]
        ).cpu()
        self.sums = found if self.sums is None else self.sums + found
        self.count += rows.shape[1]

    def statistic(self, name: str) -> np.ndarray:
        """One of :data:`STATISTICS`."""
        assert self.sums is not None
        mean, absolute, square, used = (self.sums / self.count).numpy()
        if name == "std":
            return np.sqrt(np.maximum(square.real - np.abs(mean) ** 2, 0))
        return np.asarray((absolute if name == "mean" else used).real)


def _on_readers(
    batches: Any, score: Callable[[_Moments, Tensor], np.ndarray]
) -> Callable[[nn.Module, Sequence[CouplingGroup], int], Scores]:
    """A criterion that scores the input channels of each layer that reads a group."""

    def criterion(model: nn.Module, groups: Sequence[CouplingGroup], seed: int) -> Scores:
        tensors = tensors_of(model)
        modules = dict(model.named_modules())
        readers = [[m for m in g.members if _is_plain_reader(m, modules)] for g in groups]
        names = {m.module for members in readers for m in members}
        moments = {name: _Moments() for name in names}
        device = next((t.device for t in tensors.values()), torch.device("cpu"))
        with ExitStack() as stack:
            for name in names:
                watch = _watcher(moments[name])
                handle = modules[name].register_forward_pre_hook(watch, with_kwargs=True)
                stack.callback(handle.remove)
            with evaluating(model), torch.no_grad():
                for item in read_batches(batches, model, device=device):
                    run_model(model, item)
        scores = []
        for group, members, norm in zip(groups, readers, l1(model, groups, seed), strict=True):
            parts = [
                normalised(score(moments[m.module], tensors[m.entry].detach())[m.indices].sum(1))
                for m in members
                if moments[m.module].count
            ]
            scores.append(joined(parts, "mean", group.units) if parts else norm)
        return scores

    return criterion


def _is_plain_reader(member: Member, modules: dict[str, nn.Module]) -> bool:
    """Whether the inputs of the member's module are its weight's second dim, one to one."""
    if member.role != "in" or member.dim != 1 or not member.entry.endswith(".weight"):
        return False
    module = modules.get(member.module)
    if isinstance(module, _CONVOLUTIONS):
        return module.groups == 1
    return isinstance(module, nn.Linear)


def _watcher(moments: _Moments) -> Callable[[nn.Module, Any, Any], None]:
    def watch(module: nn.Module, args: Any, kwargs: Any) -> None:
        values = tensors_in((args, kwargs))[0]
        dims = len(module.kernel_size) if isinstance(module, _CONVOLUTIONS) else 0
        # Without a batch a convolution's channels come first, with one second; linear: last.
        moments.add(values, -1 - dims)

    return watch
