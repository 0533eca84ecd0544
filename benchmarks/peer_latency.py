"""Latency at equal MACs beside Torch-Pruning: python -m benchmarks.peer_latency OUT.json.

Both prune the same weights by group L1 norms with one ratio everywhere; the output layer stays. The
peer's ratio is found by bisection, for at most half of the multiply-accumulates; ours may then have
as many as the peer has left, counted by the same rules. The two networks are timed in turns.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

import chanprune_ext as cpx
from chanprune_ext.allocation.measured_budget import compare_latency
from chanprune_ext.analysis import analyse
from chanprune_ext.report import environment

BUDGET = 0.5
NETWORKS = ("resnet50", "mobilenet_v2")


def macs_of(model: nn.Module, images: torch.Tensor) -> int:
    analysis = analyse(model, images)
    return analysis.sizes(analysis.removed_labels({})).macs()


def pruned_by_peer(
    model: nn.Module, images: torch.Tensor, round_to: int, budget: float = BUDGET
) -> nn.Module:
    """The largest network Torch-Pruning makes within the budget."""
    import torch_pruning as tp

    most = budget * macs_of(model, images)
    low, high, best = 0.0, 0.9, None
    for _ in range(10):
        ratio = (low + high) / 2
        trial = copy.deepcopy(model)
        outputs = [m for m in trial.modules() if isinstance(m, nn.Linear)]
        importance = tp.importance.GroupMagnitudeImportance(p=1)
        tp.pruner.BasePruner(
            trial,
            images,
            importance=importance,
            pruning_ratio=ratio,
            ignored_layers=outputs,
            round_to=round_to,
        ).step()
        if macs_of(trial.eval(), images) <= most:
            high, best = ratio, trial
        else:
            low = ratio
    assert best is not None
    return best


def main(out: str) -> None:
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    for name in NETWORKS:
        model = getattr(torchvision.models, name)().eval()
        images = torch.randn(1, 3, 224, 224)
        whole = macs_of(model, images)
        for round_to in (1, 8):
            theirs = pruned_by_peer(model, images, round_to)
            budget = cpx.Budget(macs=macs_of(theirs, images) / whole)
            ours = cpx.plan(model, images, budget=budget, round_to=round_to).apply(model)
            for batch in (1, 16):
                found = compare_latency(theirs, ours, torch.randn(batch, 3, 224, 224))
                row = {
                    "network": name,
                    "round_to": round_to,
                    "batch": batch,
                    "ours_macs": macs_of(ours, images) / whole,
                    "peer_macs": macs_of(theirs, images) / whole,
                    "ours_ms": found.pruned.median_ms,
                    "peer_ms": found.original.median_ms,
                    "ours_over_peer": found.ratio,
                    "standard_error": found.standard_error,
                    "rounds": len(found.pruned.samples_ms),
                }
                rows.append(row)
                print(row, flush=True)
    result = {"environment": environment(), "threads": torch.get_num_threads(), "rows": rows}
    Path(out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
