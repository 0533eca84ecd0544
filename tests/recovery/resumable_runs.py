"""Recovery runs of the tests on checkpoints, each also as a program that can be killed.

``python resumable_runs.py KIND FOLDER OUT`` runs one with checkpoints after every update and writes
what it ended with; a line goes out when it begins.
"""

from __future__ import annotations

import copy
import functools
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import chanprune_ext as cpx
from chanprune_ext.data import TensorImages
from chanprune_ext.recovery import recover

if TYPE_CHECKING:
    from chanprune_ext.recovery import RecoveryResult


class Net(nn.Module):
    """Two convolutions with batch norm, dropout, and a delay for those who want to kill it."""

    delay = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.drop, self.fc = nn.Dropout(0.2), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            time.sleep(self.delay)
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn2(self.conv2(x)).relu().mean((2, 3))
        return self.fc(self.drop(x))


class Jittered(Dataset[tuple[Tensor, int]]):
    """Images shifted in brightness by torch's and numpy's global generators as they are fetched."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        shift = float(torch.rand(())) + np.random.rand()  # noqa: NPY002
        return self.images[index] + shift, int(self.labels[index])


def networks() -> tuple[nn.Module, nn.Module]:
    """A network with a quarter of its channels removed, and the one it was."""
    torch.manual_seed(0)
    teacher = Net()
    return _plan().apply(teacher), teacher


@functools.cache
def _plan() -> cpx.PruningPlan:
    return cpx.plan(Net(), torch.randn(2, 1, 6, 6), 0.25)


def images(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (n, 1, 6, 6), dtype=torch.uint8, generator=generator)
    return pixels, pixels.float().mean((1, 2, 3)).argsort().argsort() * 3 // n


def image_set(n: int, *, augment: bool = False, seed: int = 0) -> TensorImages:
    return TensorImages(*images(n, seed), ("a", "b", "c"), (0.5,), (0.5,), augment, pad=1)


def floats(n: int) -> Tensor:
    return images(n)[0].float() / 255


COMMON: dict[str, Any] = {"epochs": 3, "lr": 0.05, "batch_size": 16, "progress": False}


def settings(kind: str) -> dict[str, Any]:
    """Arguments of ``recover``: three epochs of four updates each."""
    chosen: dict[str, dict[str, Any]] = {
        "plain": {},
        "adamw": {"optimizer": "adamw", "lr": 0.01},
        "ema": {"ema_decay": 0.9, "keep": "best", "bn_batches": 2},
        "swa": {"swa_start": 0.5, "bn_batches": 2},
        "mixup": {"mixup": 0.4, "cutmix": 1.0, "losses": {"kd": 0.9, "hard": 0.5}},
        "patience": {"patience": 1, "keep": "best", "lr": 1e-6, "warmup": 0.0},
        "unlabelled": {"train": list(floats(64).split(16)), "losses": {"kd": 1.0}},
        "features": {"losses": {"kd": 1.0, "features": 1.0}, "feature_epochs": 2.0},
        "user loader": {"train": DataLoader(Jittered(floats(64), images(64)[1]), 16, shuffle=True)},
        "own generator": {
            "train": DataLoader(
                TensorDataset(floats(64), images(64)[1]),
                16,
                shuffle=True,
                generator=torch.Generator().manual_seed(5),
            )
        },
        "user data": {"train": Jittered(floats(64), images(64)[1])},
    }
    data = {"train": image_set(70, augment=True), "val": image_set(30, seed=1)}
    return {**COMMON, **data, **copy.deepcopy(chosen[kind])}


def run(kind: str, student: nn.Module, teacher: nn.Module, **options: Any) -> RecoveryResult:
    np.random.seed(1)  # noqa: NPY002
    return recover(student, teacher, **{**settings(kind), **options})


def outcome(student: nn.Module, result: RecoveryResult) -> dict[str, Any]:
    """Weights, and the history without its wall times."""
    record = json.loads(json.dumps(result.to_dict()))
    record.pop("seconds")
    for epoch in record["history"]:
        epoch.pop("seconds")
        epoch.pop("data_wait")
    return {"weights": {k: v.clone() for k, v in student.state_dict().items()}, "record": record}


def main(kind: str, folder: str, out: str, delay: str = "0.01") -> None:
    torch.set_num_threads(1)
    student, teacher = networks()
    Net.delay = float(delay)
    print("ready", flush=True)
    result = run(kind, student, teacher, checkpoint_dir=folder, checkpoint_every=1, resume="auto")
    found = outcome(student, result)
    save_file(found["weights"], out + ".safetensors")
    Path(out + ".json").write_text(json.dumps(found["record"]))


if __name__ == "__main__":
    main(*sys.argv[1:])
