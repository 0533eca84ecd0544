"""`kd_kl_div` in plain torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from chanprune_ext.ops.kd_kl_div_arguments import Reduction, flat_rows, row_factors

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["kd_kl_div_reference"]


def kd_kl_div_reference(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 4.0,
    *,
    labels: Tensor | None = None,
    soft_weight: float = 1.0,
    hard_weight: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "batchmean",
) -> Tensor:
    """`kd_kl_div` in plain torch: fallback, test oracle and benchmark baseline."""
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    if dtype != torch.float64:
        dtype = torch.float32
    s, t = flat_rows(student).to(dtype), flat_rows(teacher).to(dtype)
    row_weights = row_factors(s.view(student.shape), weights, mask, reduction)
    if row_weights is not None:  # rows left out must not reach the gradient with 0 * NaN
        left_out = (row_weights == 0).unsqueeze(1)
        s, t = s.masked_fill(left_out, 0), t.masked_fill(left_out, 0)
    losses = s[:, :0].sum(1)  # zeros that belong to the graph even if both factors are 0
    if soft_weight != 0:
        log_p = F.log_softmax(s / temperature, dim=1)
        log_q = F.log_softmax(t / temperature, dim=1)
        q = log_q.exp()
        terms = torch.where(q == 0, torch.zeros_like(q), q * (log_q - log_p))
        losses = losses + soft_weight * temperature**2 * terms.sum(1)
    if labels is not None and hard_weight != 0:
        losses = losses + hard_weight * F.cross_entropy(
            s,
            labels.reshape(-1),
            reduction="none",
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
        )
    if row_weights is not None:
        losses = losses * row_weights
    if reduction == "none":
        return losses.reshape(student.shape[:-1])
    total = losses.sum()
    return total / max(s.shape[0], 1) if reduction == "batchmean" else total
