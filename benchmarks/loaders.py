"""How fast the loaders are, alone: python -m benchmarks.loaders [DATA] [--out FILE].

Images of a shard of ImageNet are written as a folder and as shards, and read, decoded, cropped at
random, mirrored, normalised and put into batches in five ways, in turns, with the same number of
processes and threads:

- ``bare``: torchvision's decoder and v2 transforms in a loop over the files, in this process alone;
- ``torchvision``: ``ImageFolder`` with that decoder and these transforms, in a ``DataLoader``;
- ``pillow``: the same as most scripts have it, with ``ImageFolder``'s default decoder;
- ``folder`` and ``shards``: the loaders of this package.

Each rate is divided by that of ``torchvision`` (and, without workers, of ``bare``) in the same
round; reported is the median of these ratios. Rates are counted by the clock and by the processor
time of all processes together; the latter does not mind what else the machine is doing.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import statistics
import tarfile
import tempfile
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from chanprune_ext.data import make_loader, open_dataset
from chanprune_ext.report import environment

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HOME = Path(os.environ.get("CHANPRUNE_DATA", Path(__file__).parents[2] / "shared/data"))
BATCH = 64
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TRANSFORM = v2.Compose(
    [
        v2.ToImage(),
        v2.RandomResizedCrop(224, antialias=True),
        v2.RandomHorizontalFlip(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(MEAN, STD),
    ]
)


def write_both(archive: Path, count: int, root: Path) -> list[Path]:
    """The first images of the archive as ``folder/<class>/<image>`` and as two shards."""
    files = []
    with tarfile.open(archive) as source:
        members = (member for member in source if member.isreg())
        for member in itertools.islice(members, count):
            file = source.extractfile(member)
            assert file is not None
            path = root / "folder" / "/".join(member.name.split("/")[-2:])
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file.read())
            files.append(path)
    (root / "shards").mkdir()
    for shard in range(2):
        with tarfile.open(root / "shards" / f"{shard:04}.tar", "w") as target:
            for path in files[shard::2]:
                target.add(path, str(path.relative_to(root / "folder")))
    return files


def bare(files: list[Path]) -> Iterator[torch.Tensor]:
    for start in range(0, len(files), BATCH):
        part = files[start : start + BATCH]
        yield torch.stack([TRANSFORM(decode_image(str(f), mode=ImageReadMode.RGB)) for f in part])


def decoded_by_torchvision(path: str) -> torch.Tensor:
    return decode_image(path, mode=ImageReadMode.RGB)


def passes(root: Path, files: list[Path], workers: int) -> dict[str, Callable[[], Any]]:
    """What each way iterates over, made anew for every pass."""
    folders = {
        "torchvision": ImageFolder(str(root / "folder"), TRANSFORM, loader=decoded_by_torchvision),
        "pillow": ImageFolder(str(root / "folder"), TRANSFORM),
    }
    ours = {name: open_dataset(root / name, "train", augment=True) for name in ("folder", "shards")}
    ways: dict[str, Callable[[], Any]] = {} if workers else {"bare": lambda: bare(files)}
    for name, images in folders.items():
        ways[name] = lambda images=images: DataLoader(
            images, BATCH, shuffle=True, num_workers=workers
        )
    for name, data in ours.items():
        ways[name] = lambda data=data: make_loader(data, BATCH, shuffle=True, workers=workers)
    return ways


def rates(
    ways: dict[str, Callable[[], Any]], count: int, rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Images a second of every way in every round; the first to go is another one each time."""
    names = list(ways)
    found: dict[str, dict[str, list[float]]] = {
        kind: {name: [] for name in names} for kind in ("clock", "processor")
    }
    for round_ in range(rounds + 1):
        first = round_ % len(names)
        for name in names[first:] + names[:first]:
            gc.collect()
            started, used = time.perf_counter(), sum(os.times()[:4])
            seen = 0
            for batch in ways[name]():
                seen += len(batch if isinstance(batch, torch.Tensor) else batch[0])
            del batch
            gc.collect()  # ends the workers, whose time counts from then on
            seconds, busy = time.perf_counter() - started, sum(os.times()[:4]) - used
            assert seen == count, (name, seen)
            if round_:  # the first round fills the file cache
                found["clock"][name].append(count / seconds)
                found["processor"][name].append(count / busy)
    return found


def over(found: dict[str, list[float]], base: str) -> dict[str, float]:
    """Rates divided by that of one way in the same round, median over the rounds."""
    return {
        name: round(
            statistics.median(own / other for own, other in zip(rate, found[base], strict=True)), 3
        )
        for name, rate in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("data", type=Path, nargs="?", default=HOME / "imagenet-train-1000.tar")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 2])
    parser.add_argument("--out", type=Path, default=Path("docs/results/loaders.json"))
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="The image decoding", category=DeprecationWarning)
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        files = write_both(args.data, args.images, Path(folder))
        for workers in args.workers:
            found = rates(passes(Path(folder), files, workers), len(files), args.rounds)
            row: dict[str, Any] = {"workers": workers}
            for kind, by_name in found.items():
                medians = {n: round(statistics.median(r), 1) for n, r in by_name.items()}
                row[f"images_per_{kind}_second"] = medians
                for base in ("torchvision", "bare"):
                    if base in by_name:
                        row[f"{kind}_over_{base}"] = over(by_name, base)
            rows.append(row)
            print(json.dumps(row, indent=1))
    result = {
        "command": "python -m benchmarks.loaders",
        "images": len(files),
        "source": args.data.name,
        "batch": BATCH,
        "threads": 1,
        "rounds": args.rounds,
        "environment": environment(),
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
