"""Distances between feature maps of two networks, student first, channels already matched.

Each is free of the features' scale, so that one weight serves every layer and every network, and
is computed in float32 at least. Only the student is trained.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..ops.accumulation import widened

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["attention_transfer", "channel_statistics", "feature_mimic"]

_TINY = 1e-12


def feature_mimic(student: Tensor, teacher: Tensor) -> Tensor:
    """Relative squared error ``|F_s - F_t|^2 / |F_t|^2`` over the whole batch.

    FitNets (Romero et al. 2015) without adapters; normalised as in Aflalo et al. 2020, "Knapsack
    pruning with inner distillation".

    Args:
        student (Tensor[N, ...]): features.
        teacher (Tensor[N, ...]): features of the same shape, without gradient.
    """
    student, teacher = widened(student), widened(teacher)
    return (student - teacher).square().sum() / (teacher.square().sum() + _TINY)


def attention_transfer(student: Tensor, teacher: Tensor, channel_dim: int = 1) -> Tensor:
    """Squared distance of the attention maps, mean over the batch (Zagoruyko, Komodakis 2017).

    ``| Q_s / |Q_s| - Q_t / |Q_t| |^2`` with ``Q = sum over channels of F^2`` as one vector of all
    positions. Between 0 and 2. The two may have different channels.

    Args:
        student (Tensor[N, C_s, ...]): features with at least one dim of positions.
        teacher (Tensor[N, C_t, ...]): features with the same positions, without gradient.
        channel_dim (int): the dim of the channels. Default: 1.
    """
    difference = _attention(student, channel_dim) - _attention(teacher, channel_dim)
    return difference.square().sum(1).mean()


def _attention(features: Tensor, channel_dim: int) -> Tensor:
    energy = widened(features).square().sum(channel_dim).flatten(1)
    return energy / (energy.square().sum(1, keepdim=True) + _TINY).sqrt()


def channel_statistics(
    student: Tensor, teacher: Tensor, channel_dim: int = 1, weights: Tensor | None = None
) -> Tensor:
    """How far mean and spread of every channel are from the teacher's, over batch and positions.

    ``sum_c w_c ((m_s - m_t)^2 + (d_s - d_t)^2) / sum_c w_c (m_t^2 + d_t^2)`` with means ``m`` and
    standard deviations ``d`` (without Bessel's correction): the squared 2-Wasserstein distance of
    the channels taken as Gaussians, relative to the teacher's mean energy.

    Args:
        student (Tensor[N, C, ...]): features.
        teacher (Tensor[N, C, ...]): features of as many channels, without gradient.
        channel_dim (int): the dim of the channels. Default: 1.
        weights (Tensor[C], optional): ``w``, not negative. Default: 1 each.
    """
    mean_s, deviation_s = _statistics(student, channel_dim)
    mean_t, deviation_t = _statistics(teacher, channel_dim)
    error = (mean_s - mean_t).square() + (deviation_s - deviation_t).square()
    energy = mean_t.square() + deviation_t.square()
    if weights is not None:
        error, energy = error * weights, energy * weights
    return error.sum() / (energy.sum() + _TINY)


def _statistics(features: Tensor, channel_dim: int) -> tuple[Tensor, Tensor]:
    values = widened(features).movedim(channel_dim, 0).flatten(1)
    variance, mean = torch.var_mean(values, dim=1, correction=0)
    # The root of a dead channel's variance, 0, has no finite slope.
    return mean, (variance + _TINY).sqrt()
