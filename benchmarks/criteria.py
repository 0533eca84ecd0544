"""How good a choice each criterion makes before anything is trained: table of docs/criteria.md.

    python benchmarks/criteria.py --out docs/results/criteria.json

Every inner group of ResNet-56 (half of its channels go) and MobileNetV2 (30 %) alone: the squared
error that is left at the layer that reads it after least squares on the kept channels, relative to
the variance there, mean over the groups. ResNet-56 is also measured as cut, all groups at once, and
with batch-norm statistics measured anew. The data are found through CHANPRUNE_DATA.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import chanprune_ext as cpx
from chanprune_ext import criteria
from chanprune_ext.analysis import analyse
from chanprune_ext.checkpoint import load_weights
from chanprune_ext.compensation.batch_norm import reestimate
from chanprune_ext.compensation.ledger import Ledger
from chanprune_ext.criteria import score_groups
from chanprune_ext.data import calibration_batches, open_dataset
from chanprune_ext.models import resnet56
from chanprune_ext.recovery import evaluate

HOME = Path(os.environ.get("CHANPRUNE_DATA", "../shared/data"))
RIDGE = 1e-4  # of the mean energy of an input


def choices(batches: list[Tensor]) -> dict[str, Any]:
    return {
        "filter norms, added up": criteria.magnitude(
            members="makers", reduction="sum", normalise=False
        ),
        "makers": criteria.magnitude(members="makers"),
        "readers": criteria.magnitude(members="readers"),
        "l1": "l1",
        "l2": "l2",
        "fpgm": "fpgm",
        "activation": criteria.activation(batches),
        "fluctuation": criteria.fluctuation(batches),
        "random": "random",
    }


class Gram:
    """Second moments of the unfolded inputs of a convolution, with a constant as last input."""

    def __init__(self, layer: nn.Conv2d) -> None:
        self.layer = layer
        self.total: Tensor | float = 0.0
        self.rows = 0
        self.handle = layer.register_forward_pre_hook(self.add)

    def add(self, _: nn.Module, inputs: tuple[Tensor]) -> None:
        layer = self.layer
        columns = F.unfold(inputs[0], layer.kernel_size, padding=layer.padding).mT.flatten(0, 1)
        columns = torch.cat([columns, columns.new_ones(len(columns), 1)], 1)
        self.total = self.total + (columns.mT @ columns).double()
        self.rows += len(columns)

    def error(self, kept: np.ndarray) -> float:
        """Error of the best fit on the kept channels, relative to the variance."""
        gram = torch.as_tensor(self.total) / self.rows
        weight = F.pad(self.layer.weight.detach().flatten(1).double(), (0, 1))
        taps = self.layer.weight[0, 0].numel()
        index = torch.from_numpy(np.flatnonzero(np.r_[np.repeat(kept, taps), True]))
        energy = (weight @ gram * weight).sum()
        variance = energy - (weight @ gram[-1]).square().sum()
        left = gram[index][:, index]
        left += RIDGE * left.diagonal().mean() * torch.eye(len(index), dtype=torch.float64)
        right = gram[index] @ weight.mT
        return float((energy - (right * torch.linalg.solve(left, right)).sum()) / variance)


def errors(model: nn.Module, batches: list[Tensor], ratio: float) -> dict[str, float]:
    modules = dict(model.named_modules())
    groups = [
        g
        for g in analyse(model, batches[0][:1]).groups
        if g.kind == "hidden" and len(g.consumers) == 1 and len(g.members) > 2
    ]
    readers = [modules[g.consumers[0]] for g in groups]
    pairs = [(g, r) for g, r in zip(groups, readers, strict=True) if isinstance(r, nn.Conv2d)]
    pairs = [(g, r) for g, r in pairs if r.groups == 1 and r.in_channels == g.units]
    grams = [Gram(reader) for _, reader in pairs]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for gram in grams:
        gram.handle.remove()
    found = {}
    for name, criterion in choices(batches).items():
        scores = score_groups(model, [g for g, _ in pairs], criterion)
        left = []
        for score, gram in zip(scores, grams, strict=True):
            kept = np.ones(len(score), dtype=bool)
            kept[np.argsort(score)[: round(ratio * len(score))]] = False
            left.append(gram.error(kept))
        found[name] = float(np.mean(left))
    return {"groups": len(pairs), **found}


def accuracies(model: nn.Module, batches: list[Tensor], test: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, criterion in choices(batches).items():
        made = cpx.plan(
            model, batches[0][:1], 0.0, ratios={"layer*.conv1": 0.5}, criterion=criterion
        )
        pruned = made.apply(model)
        cut = evaluate(pruned, test, channels_last=True)
        reestimate(pruned, batches, Ledger())
        renewed = evaluate(pruned, test, channels_last=True)
        found[name] = {"cut": cut.top1, "batch_norm": renewed.top1, "n": cut.n}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=("mobilenet_v2", "resnet56"))
    args = parser.parse_args()
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    if args.only != "mobilenet_v2":
        model = load_weights(resnet56(), HOME / "resnet56-cifar10.safetensors").eval()
        train = open_dataset(HOME / "cifar10-raw-subset.npz", "train")
        test = open_dataset(HOME / "cifar10-raw-subset.npz", "test")
        batches = calibration_batches(train, 256)
        results["resnet56"] = {
            "ratio": 0.5,
            "images": 128,
            "error": errors(model, batches[:2], 0.5),
            "accuracy": accuracies(model, batches, test),
        }
    if args.only != "resnet56":
        model = load_weights(
            torchvision.models.mobilenet_v2(weights=None),
            HOME / "mobilenet_v2-imagenet.safetensors",
        ).eval()
        train = open_dataset(
            HOME / "imagenet-train-1000.tar",
            "train",
            mean=(0.5,) * 3,
            std=(0.5,) * 3,
            class_file=HOME / "imagenet_wnids.txt",
        )
        batches = calibration_batches(train, 64, batch_size=32)
        results["mobilenet_v2"] = {
            "ratio": 0.3,
            "images": 64,
            "error": errors(model, batches, 0.3),
        }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
