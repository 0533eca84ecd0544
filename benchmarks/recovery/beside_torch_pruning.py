"""Accuracy beside Torch-Pruning: equal MACs, the same training loop, the same images and epochs.

    python -m benchmarks.recovery.beside_torch_pruning resnet56 --epochs 5
    python -m benchmarks.recovery.beside_torch_pruning mobilenet_v2 --epochs 2

The peer scores by group L1 norms and prunes every group by one ratio, found by bisection, until the
network has at most its share of the multiply-accumulates; the output layer stays. Ours removes
inner channels by elimination within the same budget and compensates, on unlabelled training images.
Both then train by the same recipes, from what they have then. It can't prune ResNet-56 with padded
shortcuts, so both get it with 1x1 convolutions there, which compute just the same.

Recipes: ``usual`` is this package's default for a student (distillation and labels, batch norms in
training mode); ``frozen`` distils at temperature 1 with the batch norms' statistics kept. Each row
is the last epoch; test images only report. Needs CHANPRUNE_DATA and ``pip install torch-pruning``.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import chanprune_ext as cpx
from chanprune_ext.checkpoint import load_weights
from chanprune_ext.data import calibration_batches, open_dataset
from chanprune_ext.jobs.published import ImageNetImages, inner_channels_within, trained_mobilenet_v2
from chanprune_ext.models import PadShortcut, resnet56
from chanprune_ext.recovery import evaluate, recover
from chanprune_ext.report import environment

from ..peer_latency import macs_of, pruned_by_peer

if TYPE_CHECKING:
    from chanprune_ext.data import ImageDataset

DATA = Path(os.environ.get("CHANPRUNE_DATA", "../shared/data"))
RESULTS = Path(__file__).parents[2] / "docs" / "results"
RECIPES: dict[str, dict[str, Any]] = {
    "usual": {},
    "frozen": {
        "losses": {"kd": 1.0},
        "temperature": 1.0,
        "freeze_batch_norm": True,
        "lr": 0.001,
    },
}


@dataclass
class Job:
    """A trained network and its images."""

    model: nn.Module
    train: ImageDataset
    test: ImageDataset
    calibration: list[Tensor]
    macs: float
    settings: dict[str, Any]


def with_projections(model: nn.Module) -> nn.Module:
    """Replaces padded shortcuts by 1x1 convolutions of stride 2 that compute the same."""
    for path, module in list(model.named_modules()):
        if isinstance(module, PadShortcut):
            above = model.get_submodule(path.rpartition(".")[0])
            read, made = above.conv1.in_channels, above.conv1.out_channels
            projection = nn.Conv2d(read, made, 1, stride=2, bias=False)
            with torch.no_grad():
                projection.weight.zero_()
                kept = torch.arange(read)
                projection.weight[module.pad_front + kept, kept] = 1
            above.shortcut = projection
    return model


def resnet56_job() -> Job:
    model = load_weights(resnet56(), DATA / "resnet56-cifar10.safetensors").eval()
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        before = model(images)
        torch.testing.assert_close(with_projections(model)(images), before)
    data = DATA / "cifar10-raw-subset.npz"
    train = open_dataset(data, "train", augment=True)
    batches = calibration_batches(train, 512, mixed=True)
    return Job(model, train, open_dataset(data, "test"), batches, 0.5, {"batch_size": 128})


def mobilenet_v2_job() -> Job:
    images = ImageNetImages(
        str(DATA / "imagenet-train-1000.tar"),
        str(DATA / "imagenet-val-650.tar"),
        DATA / "imagenet_wnids.txt",
    )
    return Job(
        trained_mobilenet_v2(DATA / "mobilenet_v2-imagenet.safetensors"),
        images.training(augment=True),
        images.test(),
        calibration_batches(images.training(), 1000),
        0.75,
        {"batch_size": 32},
    )


JOBS = {"resnet56": resnet56_job, "mobilenet_v2": mobilenet_v2_job}


def ours(job: Job) -> nn.Module:
    options = inner_channels_within(job.calibration, cpx.Budget(macs=job.macs))
    pruned = cpx.plan(job.model, torch.zeros(1, *job.test.shape), **options).apply(job.model)
    cpx.compensate(pruned, job.model, job.calibration)
    return pruned


def peer(job: Job) -> nn.Module:
    return pruned_by_peer(job.model, torch.zeros(1, *job.test.shape), 1, job.macs).eval()


def measured(job: Job, epochs: int, seed: int) -> list[dict[str, Any]]:
    whole = macs_of(job.model, torch.zeros(1, *job.test.shape))
    rows: list[dict[str, Any]] = []

    def tell(who: str, stage: str, model: nn.Module, seconds: float) -> None:
        found = evaluate(model, job.test)
        row = {
            "who": who,
            "stage": stage,
            "top1": found.top1,
            "standard_error": found.standard_error,
            "n": found.n,
            "macs_share": macs_of(model, torch.zeros(1, *job.test.shape)) / whole,
            "params": sum(p.numel() for p in model.parameters()),
            "cpu_seconds": round(seconds, 1),
        }
        rows.append(row)
        print(row, flush=True)

    tell("original", "as trained", job.model, 0.0)
    for who, prune in (("ours", ours), ("Torch-Pruning", peer)):
        begun = time.process_time()
        start = prune(job)
        tell(who, "before training", start, time.process_time() - begun)
        for name, recipe in RECIPES.items():
            student = copy.deepcopy(start)
            settings = {"epochs": epochs, "seed": seed, "channels_last": True, "progress": False}
            begun = time.process_time()
            recover(student, job.model, train=job.train, **settings, **job.settings, **recipe)
            tell(who, f"{epochs} epochs, {name}", student, time.process_time() - begun)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("network", choices=JOBS)
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    rows = measured(JOBS[args.network](), args.epochs, args.seed)
    result = {
        "command": "python -m benchmarks.recovery.beside_torch_pruning "
        f"{args.network} --epochs {args.epochs} --seed {args.seed}",
        "environment": environment(),
        "rows": rows,
    }
    out = RESULTS / f"beside-torch-pruning-{args.network}.json"
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
