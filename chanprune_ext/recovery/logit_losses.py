"""Distances between the logits of two classifiers, student first; only the student is trained.

The Kullback-Leibler divergence itself is the native operator :func:`chanprune_ext.ops.kd_kl_div`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from ..errors import InvalidArgumentError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["decoupled_kd", "dist", "standardised"]

_TINY = 1e-7


def standardised(logits: Tensor) -> Tensor:
    """Logits of each sample with mean 0 and standard deviation 1 (Sun et al. 2024, CVPR).

    ``(z - mean(z)) / (std(z) + 1e-7)`` over the classes, ``std`` with Bessel's correction. What is
    left is the shape of the prediction, so that a student need not match the teacher's range.

    Args:
        logits (Tensor[N, K]): floating point, K > 1.
    """
    deviation, mean = torch.std_mean(logits, dim=1, keepdim=True)
    return (logits - mean) / (deviation + _TINY)


def decoupled_kd(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    temperature: float = 4.0,
    *,
    alpha: float = 1.0,
    beta: float = 2.0,
) -> Tensor:
    """Distillation split into target and non-target classes (Zhao et al. 2022, CVPR).

    ``T^2 (alpha KL(b_t || b_s) + beta KL(q_t || q_s))``, mean over the batch: ``b`` is the
    two-valued distribution of "target class or not", ``q`` the softmax over the other classes
    alone, both of logits / T. Plain distillation weighs the second term by the little probability
    that a sure teacher leaves to it; here its weight is free.

    Args:
        student (Tensor[N, K]): logits, K > 1.
        teacher (Tensor[N, K]): logits, without gradient.
        target (Tensor[N]): int64 class of every sample.
        temperature (float): T. Default: 4.
        alpha (float): weight of the target term. Default: 1.
        beta (float): weight of the non-target term. Default: 2.

    Raises:
        InvalidArgumentError: there is only one class.
    """
    if student.shape[1] < 2:
        raise InvalidArgumentError("dkd: needs at least two classes, got 1")
    binary_s, others_s = _decoupled(student / temperature, target)
    binary_t, others_t = _decoupled(teacher / temperature, target)
    loss = alpha * _divergence(binary_t, binary_s) + beta * _divergence(others_t, others_s)
    return temperature**2 * loss


def _decoupled(z: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities ``[N, 2]`` of target or not, and ``[N, K - 1]`` among the other classes."""
    samples, classes = z.shape
    other = torch.ones_like(z, dtype=torch.bool).scatter_(1, target[:, None], value=False)
    rest = z.masked_select(other).view(samples, classes - 1)
    whole = z.logsumexp(1)
    binary = torch.stack([z.gather(1, target[:, None]).squeeze(1), rest.logsumexp(1)], 1)
    return binary - whole[:, None], rest.log_softmax(1)


def _divergence(wanted: Tensor, found: Tensor) -> Tensor:
    return F.kl_div(found, wanted, reduction="batchmean", log_target=True)


def dist(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """Correlation instead of equality of the predictions (Huang et al. 2022, NeurIPS).

    ``T^2 (1 - r(p_s, p_t) over the classes of each sample + 1 - r(p_s, p_t) over the batch for each
    class)``, ``p = softmax(logits / T)``, ``r`` Pearson's correlation; each part is a mean. A row
    or column without any variation counts as uncorrelated and has no gradient.

    Args:
        student (Tensor[N, K]): logits.
        teacher (Tensor[N, K]): logits, without gradient.
        temperature (float): T. Default: 4.
    """
    p = (student / temperature).softmax(1)
    q = (teacher / temperature).softmax(1)
    loss = 2 - _correlation(p, q).mean() - _correlation(p.T, q.T).mean()
    return temperature**2 * loss


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's correlation of each pair of rows."""
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return F.cosine_similarity(a, b, dim=1, eps=1e-8)
