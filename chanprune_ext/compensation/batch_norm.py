"""Batch-norm statistics of a pruned network, measured anew."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from ..analysis.calls import run_model, steady_calls

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

    from .ledger import Ledger

__all__ = ["measured_batch_norms", "reestimate"]


def measured_batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """Batch norms that keep running statistics."""
    return [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    ]


def reestimate(model: nn.Module, batches: Iterable[Any], ledger: Ledger) -> None:
    """Replaces running means and variances by their averages over ``batches``.

    Every batch counts the same, as with ``momentum=None``. All else stays in eval mode: dropout is
    off, and nothing has gradients. Flags, momenta and batch counters are left as they were.

    Args:
        model: Network to measure in; left in eval or training mode as it was.
        batches: Inputs, at least two values a channel each.
        ledger: Notes the statistics before they are replaced.
    """
    norms = measured_batch_norms(model)
    settings = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    with steady_calls(model):
        try:
            for norm in norms:
                ledger.remember(norm.running_mean, norm.running_var)
                norm.momentum = None
                # A counter of its own: the user's also counts for later training, or is None.
                norm.num_batches_tracked = torch.zeros((), dtype=torch.long, device="cpu")
                norm.reset_running_stats()
                norm.training = True
            for batch in batches:
                run_model(model, batch)
        finally:
            for norm, momentum, counter in settings:
                norm.momentum = momentum
                norm.num_batches_tracked = counter
                norm.training = False
