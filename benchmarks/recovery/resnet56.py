"""Which recovery recipe gives ResNet-56 on CIFAR-10 the most, chosen without the test images.

    python benchmarks/recovery/resnet56.py search --out runs/recovery
    python benchmarks/recovery/resnet56.py final --seeds 0 1 2 --out runs/recovery

Inner channels go by elimination within half of the MACs, the rest is compensated on unlabelled
training images (``--calibration-images``) and as many blends of them ("MACs x0.50" of ``chanprune
reproduce cifar10-resnet56``). ``search`` holds back every eighth training image, trains each recipe
on the others and measures on those held back: top-1, agreement with the unpruned network and KL
divergence from it. It measures also on images that the unpruned network was not trained on either,
every third JPEG test image that is none of the test images of ``final``. ``final`` trains chosen
recipes on all training images and reports the last epoch on the test images. The recipe ``none``
leaves the compensated network as it is, ``blocks`` and ``blocks-blends`` tune one block after the
other in place of training. One JSON line a run goes to ``<out>/<command>.jsonl``; runs
already there are not repeated.

``--transfer`` adds the 50,000 JPEG training images, whose labels are not used.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import chanprune_ext as cpx
from chanprune_ext.checkpoint import load_weights
from chanprune_ext.data import TensorImages, calibration_batches, make_loader, open_dataset
from chanprune_ext.jobs.published import inner_channels_within, tune_blocks_on_small_images
from chanprune_ext.models import resnet56
from chanprune_ext.recovery import evaluate, recover

KD: dict[str, float] = {"kd": 1.0}
FROZEN: dict[str, Any] = {"losses": KD, "freeze_batch_norm": True}
MIXED: dict[str, Any] = {"mixup": 1.0, "cutmix": 1.0}
NOTHING = "none"  # the recipe that leaves the compensated network as it is
# Recipes that tune one block after the other, on the images alone or on their blends too.
BLOCKS = {"blocks": {"mixed": False}, "blocks-blends": {"mixed": True}}
RECIPES: dict[str, dict[str, Any]] = {
    NOTHING: {},
    **BLOCKS,
    "kd-mix-ema": {"losses": KD, **MIXED, "ema_decay": 0.98},
    "frozen": {**FROZEN, "lr": 0.001},
    "frozen-t1": {**FROZEN, "lr": 0.001, "temperature": 1.0},
    "frozen-t1-adamw": {
        **FROZEN,
        "temperature": 1.0,
        "optimizer": "adamw",
        "lr": 2e-4,
        "weight_decay": 0.0,
    },
    "frozen-t1-features": {
        **FROZEN,
        "losses": {**KD, "features": 1.0},
        "taps": ["layer3"],
        "lr": 0.001,
        "temperature": 1.0,
    },
    "frozen-t1-mix": {**FROZEN, **MIXED, "lr": 0.003, "temperature": 1.0},
}


def subset(data: TensorImages, chosen: torch.Tensor) -> TensorImages:
    part = copy.copy(data)
    part.images, part.labels = data.images[chosen], data.labels[chosen]
    return part


def with_transfer(data: TensorImages, other: TensorImages) -> TensorImages:
    """Adds images that only the teacher says something about."""
    both = copy.copy(data)
    both.images = torch.cat([data.images, other.images])
    both.labels = torch.cat([data.labels, other.labels])
    return both


def unseen_images(jpegs: TensorImages, test: TensorImages) -> TensorImages:
    """Every third of the JPEG test images that are not copies of the given test images."""
    distances = torch.cdist(test.images.float().flatten(1), jpegs.images.float().flatten(1))
    fresh = torch.ones(len(jpegs), dtype=torch.bool)
    fresh[distances.argmin(1)] = False
    return subset(jpegs, fresh.nonzero().flatten()[::3])


def start_network(
    teacher: torch.nn.Module, train: TensorImages, images: int, seed: int, file: Path
) -> Any:
    """The pruned and compensated network, made once a seed."""
    if not file.exists():
        batches = calibration_batches(train, 512, seed=seed, mixed=True)
        options = inner_channels_within(batches, cpx.Budget(macs=0.5))
        made = cpx.plan(teacher, torch.zeros(1, 3, 32, 32), **options)
        pruned = made.apply(teacher)
        if images != 512:
            batches = calibration_batches(train, min(images, len(train)), seed=seed, mixed=True)
        cpx.compensate(pruned, teacher, batches, plan=made)
        cpx.save(pruned, file)
    return cpx.load(file, resnet56())


@torch.no_grad()
def against_teacher(student: torch.nn.Module, teacher: torch.nn.Module, data: TensorImages) -> Any:
    student.eval(), teacher.eval()
    agree, kl = 0, 0.0
    for images, _ in make_loader(data.without_augmentation(), 256):
        s, t = student(images), teacher(images)
        agree += int((s.argmax(1) == t.argmax(1)).sum())
        kl += float(F.kl_div(s.log_softmax(1), t.log_softmax(1), reduction="sum", log_target=True))
    return {"agreement": agree / len(data), "kl": kl / len(data)}


def measured(
    student: torch.nn.Module,
    teacher: torch.nn.Module,
    judged: TensorImages,
    unseen: TensorImages | None,
) -> dict[str, Any]:
    """What a line says of a network."""

    def on(data: TensorImages) -> dict[str, Any]:
        found = evaluate(student, data)
        return {
            "top1": found.top1,
            "standard_error": found.standard_error,
            "loss": found.loss,
            "n": found.n,
            **against_teacher(student, teacher, data),
        }

    return on(judged) if unseen is None else {**on(judged), "unseen": on(unseen)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=("search", "final"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument(
        "--calibration-images",
        type=int,
        default=512,
        help="of compensation, all if more; of elimination: 512",
    )
    parser.add_argument("--transfer", action="store_true", help="with the JPEG training images")
    parser.add_argument("--settings", type=json.loads, default={}, help="JSON, over each recipe")
    args = parser.parse_args()
    home = Path(os.environ.get("CHANPRUNE_DATA", "../shared/data"))
    teacher = load_weights(resnet56(), home / "resnet56-cifar10.safetensors").eval()
    train = open_dataset(home / "cifar10-raw-subset.npz", "train", augment=True)
    judged = open_dataset(home / "cifar10-raw-subset.npz", "test")
    unseen = None
    if args.command == "search":
        unseen = unseen_images(open_dataset(home / "cifar10-jpeg.tar.gz", "test"), judged)
        held_back = torch.arange(len(train)) % 8 == 7
        judged = subset(train, held_back).without_augmentation()
        train = subset(train, ~held_back)
    args.out.mkdir(parents=True, exist_ok=True)
    log = args.out / f"{args.command}.jsonl"
    done = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    transfer = open_dataset(home / "cifar10-jpeg.tar.gz", "train") if args.transfer else None
    for seed in args.seeds:
        count = args.calibration_images
        file = args.out / f"{args.command}-start-{seed}-of-{count}.safetensors"
        start = start_network(teacher, train, count, seed, file)
        start_top1 = evaluate(start, judged).top1
        for name in args.recipes:
            usual = {"epochs": args.epochs, "channels_last": True, "seed": seed}
            trained = name != NOTHING and name not in BLOCKS
            settings = {**usual, **RECIPES[name], **args.settings} if trained else RECIPES[name]
            key = {
                "recipe": name,
                "settings": settings,
                "transfer": args.transfer,
                "calibration_images": count,
                "seed": seed,
            }
            if any({k: d.get(k) for k in key} == key for d in done):
                continue
            student, training, begun = copy.deepcopy(start), {}, time.process_time()
            if name in BLOCKS:
                tune_blocks_on_small_images(student, teacher, train, len(train), **settings)
                training = {"cpu_seconds": round(time.process_time() - begun, 1)}
            elif trained:
                data = copy.copy(train)
                if isinstance(transfer, TensorImages):
                    data = with_transfer(data, transfer)
                data.seed = seed
                result = recover(student, teacher, train=data, progress=False, **settings)
                training = {
                    "cpu_seconds": round(time.process_time() - begun, 1),
                    "train_loss": [round(record.loss, 5) for record in result.history],
                    "full_recipe": result.recipe.to_dict(),
                }
            line = {
                **key,
                "start": start_top1,
                **measured(student, teacher, judged, unseen),
                **training,
            }
            with log.open("a") as lines:
                lines.write(json.dumps(line) + "\n")
            print({k: v for k, v in line.items() if isinstance(v, str | float)}, flush=True)


if __name__ == "__main__":
    main()
