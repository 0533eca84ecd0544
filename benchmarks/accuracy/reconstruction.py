"""Accuracy after pruning, after closed-form compensation, and after block-wise reconstruction.

python -m benchmarks.accuracy.reconstruction mobilenet_v2
python -m benchmarks.accuracy.reconstruction resnet56

Needs the weights and images of CHANPRUNE_DATA. No labels are used but to count at the end. The
compensated network is kept in the folder of ``--work`` and used again when it is there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import chanprune_ext
from chanprune_ext.data import calibration_batches, open_dataset
from chanprune_ext.models import resnet56

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chanprune_ext.data import ImageDataset

DATA = Path(os.environ.get("CHANPRUNE_DATA", Path(__file__).parents[3] / "shared" / "data"))
RESULTS = Path(__file__).parents[2] / "docs" / "results"


@dataclass
class Job:
    """A network, what to prune of it, and images.

    Attributes:
        model: The trained network.
        producers: Modules whose output channels are thinned out.
        ratio: Share of them that goes.
        calibration: Unlabelled images.
        test: Labelled images, for counting only.
        shift: Pixels by which views of an image are shifted, mirrored half of the time.
        amp: Autocast type of the gradients.
    """

    model: nn.Module
    producers: tuple[str, ...]
    ratio: float
    calibration: ImageDataset
    test: ImageDataset
    shift: int
    amp: torch.dtype | None


def mobilenet_v2() -> Job:
    """Hidden channels -30 % in every block with an expansion."""
    import torchvision

    model = torchvision.models.mobilenet_v2()
    model.load_state_dict(load_file(DATA / "mobilenet_v2-imagenet.safetensors"))
    options: dict[str, Any] = {
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
        "class_file": DATA / "imagenet_wnids.txt",
    }
    return Job(
        model=model,
        producers=tuple(f"features.{i}.conv.0.0" for i in range(2, 18)),
        ratio=0.3,
        calibration=open_dataset(DATA / "imagenet-train-1000.tar", "train", resize=256, **options),
        test=open_dataset(DATA / "imagenet-val-650.tar", "val", resize=224, **options),
        shift=16,
        amp=torch.bfloat16,
    )


def cifar_resnet56() -> Job:
    """Half of the inner channels of every block."""
    model = resnet56()
    model.load_state_dict(load_file(DATA / "resnet56-cifar10.safetensors"))
    images = DATA / "cifar10-raw-subset.npz"
    return Job(
        model=model,
        producers=tuple(f"layer{s}.{i}.conv1" for s in (1, 2, 3) for i in range(9)),
        ratio=0.5,
        calibration=open_dataset(images, "train"),
        test=open_dataset(images, "test"),
        shift=2,
        amp=None,
    )


JOBS = {"mobilenet_v2": (mobilenet_v2, 1000), "resnet56": (cifar_resnet56, 1024)}


def filter_norms(producers: Sequence[str]) -> Any:
    """L1 norm of the filters of these layers alone, not of what goes along (depthwise filters)."""

    def norms(model: nn.Module, groups: Any, _: int) -> list[np.ndarray]:
        scores = []
        for group in groups:
            score = np.zeros(group.units)
            for member in group.members:
                if member.role == "out" and member.module in producers:
                    weight = model.get_parameter(member.entry).detach()
                    score += weight.abs().flatten(1).sum(1).numpy()[member.indices].sum(1)
            scores.append(score)
        return scores

    return norms


def views_of(shift: int) -> Any:
    """Images shifted by up to ``shift`` pixels, and mirrored half of the time."""

    def views(batch: Tensor) -> Tensor:
        height, width = batch.shape[2:]
        padded = F.pad(batch, (shift,) * 4, mode="reflect")
        out = torch.empty_like(batch)
        for i in range(len(batch)):
            top, left = torch.randint(0, 2 * shift + 1, (2,)).tolist()
            view = padded[i, :, top : top + height, left : left + width]
            out[i] = view.flip(2) if torch.rand(()) < 0.5 else view
        return out

    return views


class Counter:
    """Compares networks on the test images."""

    def __init__(self, job: Job, count: int | None) -> None:
        samples = [job.test[i] for i in range(len(job.test) if count is None else count)]
        self._images = torch.stack([image for image, _ in samples])
        self._labels = torch.tensor([label for _, label in samples])
        self._original = self._logits(job.model)

    @torch.no_grad()
    def _logits(self, model: nn.Module) -> Tensor:
        model.eval()
        last = torch.channels_last
        return torch.cat(
            [model(x.contiguous(memory_format=last)).float() for x in self._images.split(50)]
        )

    def row(self, model: nn.Module) -> dict[str, Any]:
        """Top-1, the paired difference from the original, agreement, and divergence."""
        logits = self._logits(model)
        n = len(logits)
        right, was_right = (
            (z.argmax(1) == self._labels).double() for z in (logits, self._original)
        )
        same = (logits.argmax(1) == self._original.argmax(1)).double()
        p, q = F.log_softmax(self._original, 1), F.log_softmax(logits, 1)
        kl = (p.exp() * (p - q)).sum(1).double()

        def percent(values: Tensor) -> dict[str, float]:
            return {
                "value": round(100 * float(values.mean()), 2),
                "standard_error": round(100 * float(values.std()) / math.sqrt(n), 2),
            }

        return {
            "n": n,
            "top1": percent(right),
            "difference_from_original": percent(right - was_right),
            "agreement_with_original": percent(same),
            "kl": round(float(kl.mean()), 4),
        }


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs one job from the trained network to the table."""
    make, images = JOBS[arguments.network]
    images = arguments.images or images
    job = make()
    original = job.model.eval().to(memory_format=torch.channels_last)
    counter = Counter(job, arguments.test_images)
    rows = {"original": counter.row(original)}
    _say(rows)
    plan = chanprune_ext.plan(
        original,
        torch.zeros(2, *job.test.shape),
        ratio=0,
        ratios=dict.fromkeys(job.producers, job.ratio),
        criterion=filter_norms(job.producers),
    )
    pruned = plan.apply(original).to(memory_format=torch.channels_last)
    rows["pruned"] = counter.row(pruned)
    _say(rows)
    batches = calibration_batches(job.calibration, images, 50, seed=arguments.seed)
    seconds = {"compensate": _compensated(pruned, original, batches, arguments, images)}
    rows["compensated"] = counter.row(pruned)
    _say(rows)
    start = time.process_time()
    report = chanprune_ext.reconstruct(
        pruned,
        original,
        [b.contiguous(memory_format=torch.channels_last) for b in batches],
        epochs=arguments.epochs,
        lr=arguments.lr,
        batch_size=arguments.batch_size,
        views=arguments.views,
        augment=views_of(job.shift) if arguments.views else None,
        amp=job.amp,
        seed=arguments.seed,
    )
    seconds["reconstruct"] = round(time.process_time() - start, 1)
    sys.stdout.write(f"{report}\n" + "".join(f"  {block}\n" for block in report.blocks))
    rows["reconstructed"] = counter.row(pruned)
    _say(rows)
    return {
        "network": arguments.network,
        "pruned": {"modules": job.producers, "ratio": job.ratio, "criterion": "L1 of the filters"},
        "macs": [plan.macs_before, plan.macs_after],
        "params": [plan.params_before, plan.params_after],
        "calibration_images": images,
        "options": {
            key: getattr(arguments, key) for key in ("epochs", "lr", "batch_size", "views", "seed")
        },
        "rows": rows,
        "cpu_seconds": seconds,
        "reconstruction": report.to_dict(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "command": f"python -m benchmarks.accuracy.reconstruction {' '.join(sys.argv[1:])}",
    }


def _compensated(
    pruned: nn.Module,
    original: nn.Module,
    batches: list[Tensor],
    arguments: argparse.Namespace,
    images: int,
) -> float | None:
    """Compensates ``pruned``, or takes the weights of an earlier run; CPU seconds."""
    file = None
    if arguments.work is not None:
        file = arguments.work / f"{arguments.network}-{images}-{arguments.seed}.safetensors"
        if file.exists():
            pruned.load_state_dict(load_file(file))
            return None
    start = time.process_time()
    report = chanprune_ext.compensate(pruned, original, batches)
    seconds = round(time.process_time() - start, 1)
    sys.stdout.write(f"{report}\n")
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in pruned.state_dict().items()}, file)
    return seconds


def _say(rows: dict[str, Any]) -> None:
    name, row = list(rows.items())[-1]
    top1, same = row["top1"], row["agreement_with_original"]
    sys.stdout.write(
        f"{name}: top-1 {top1['value']} +- {top1['standard_error']}, agreement {same['value']} +- "
        f"{same['standard_error']}, KL {row['kl']} (n = {row['n']})\n"
    )
    sys.stdout.flush()


def main() -> None:
    """Parses arguments, runs, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("network", choices=JOBS)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--views", type=int, default=1, help="changed copies of every image")
    parser.add_argument("--images", type=int, help="calibration images, if fewer")
    parser.add_argument("--test-images", type=int, help="the first of the test images only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="folder for the compensated network")
    parser.add_argument(
        "--json", type=Path, help="default: docs/results/reconstruction-NETWORK.json"
    )
    arguments = parser.parse_args()
    result = measured(arguments)
    path = arguments.json or RESULTS / f"reconstruction-{arguments.network}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
