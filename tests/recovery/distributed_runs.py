"""Recovery runs in several processes, for tests: what each process of ``launch`` executes.

``python distributed_runs.py FOLDER`` reads ``FOLDER/job.json``, runs the jobs in it one after the
other, and writes what each process has ended with.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

from chanprune_ext.data import TensorImages, open_dataset
from chanprune_ext.recovery import checkpoints, recover
from chanprune_ext.recovery.loop import TrainingLoop


class Plain(nn.Module):
    """Without anything that depends on the other images of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x.flatten(1)[:, :6]).tanh())


class Normed(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.norm(self.one(x)).tanh())


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).tanh())


class Blocks(nn.Module):
    """Three blocks in a list, an input and an output layer of an odd number of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, 12), nn.Linear(12, 3)
        self.blocks = nn.ModuleList([Block() for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Dropping(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.masks: list[list[float]] = []

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.functional.dropout(torch.ones(16), 0.3, self.training)
        self.masks.append(mask.tolist())
        return self.two(self.one(x.flatten(1)).tanh() * mask)


class Endless(IterableDataset[Any]):
    """Batches of a process's own; the same in all of them unless ``split``."""

    def __init__(self, split: bool) -> None:
        self.split = split

    def __len__(self) -> int:
        return 6

    def __iter__(self) -> Any:
        rank = dist.get_rank() if self.split and dist.is_initialized() else 0
        x, y = points(96).tensors
        for k in range(rank, 12, 2):
            yield x[8 * k : 8 * k + 8], y[8 * k : 8 * k + 8]


class Unreached(Plain):
    """With a layer that gets no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.aside = nn.Linear(6, 3)


class OwnWay(DataLoader[Any]):
    """A loader that iterates in its own way."""

    def __iter__(self) -> Any:
        for x, y in super().__iter__():
            yield 2 * x, y


NETS = {kind.__name__: kind for kind in (Plain, Normed, Dropping, Blocks, Unreached)}


def net(kind: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return NETS[kind]()


def points(n: int, seed: int = 0) -> TensorDataset:
    """Three classes told apart by which pair of the six inputs is largest."""
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, x.view(n, 3, 2).sum(2).argmax(1))


def batches(data: TensorDataset, size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(*(tensor.split(size) for tensor in data.tensors), strict=True))


def data_of(job: dict[str, Any], size: int) -> Any:
    data, how = points(job.get("images", 96)), job.get("data", "dataset")
    if how == "loader":  # shuffled by a generator of torch
        generator = torch.Generator().manual_seed(3)
        return DataLoader(data, size, shuffle=True, drop_last=True, generator=generator)
    if how == "own way":
        return OwnWay(data, size)
    if how == "own way, split":
        return OwnWay(data, size, sampler=DistributedSampler(data, shuffle=False))
    if how == "doubled list":
        return [(2 * x, y) for x, y in batches(data, size)]
    if how == "uneven loader":
        return DataLoader(data, size)
    if how == "sampler":
        return DataLoader(data, size, sampler=DistributedSampler(data, shuffle=False))
    if how == "foreign sampler":
        return DataLoader(data, size, sampler=DistributedSampler(data, 3, 0))
    if how == "shards":
        return open_dataset(job["folder"], "train", augment=True, size=66, resize=70)
    if how == "images":  # whose loader can begin in the middle of an epoch
        pixels = (data.tensors[0] * 40 + 128).clamp(0, 255).to(torch.uint8).view(-1, 1, 1, 6)
        return TensorImages(pixels, data.tensors[1], ("a", "b", "c"), (0.5,), (0.2,), True, pad=1)
    if how == "filled list":  # what two processes make of an uneven loader
        filled = [*range(len(data)), *range(-len(data) % size)]
        return batches(TensorDataset(*data[filled]), size)
    if how == "list":
        return batches(data, size)
    if how == "own":
        return DataLoader(Endless(split=True), batch_size=None)
    if how == "same":
        return DataLoader(Endless(split=False), batch_size=None)
    return data


def run(job: dict[str, Any]) -> dict[str, Any]:
    """One call of ``recover``; weights, loss curve, and whatever else is compared."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    student, teacher = net(job.get("net", "Plain")), None
    for name in job.get("frozen", []):
        student.get_submodule(name).requires_grad_(False)
    if job.get("made") == "differently":
        student = net(job["net"], rank)
        student.norm.running_mean.fill_(rank)
    if job.get("teacher"):
        kind = "Blocks" if job["teacher"] == "blocks" else "Plain"
        teacher = net(kind, 1 + rank * (job["teacher"] == "another in each process"))
    settings = {"epochs": 2, "lr": 0.05, "batch_size": 8, **job.get("settings", {})}
    val: Any = points(job["val"], seed=1) if job.get("val") else None
    if job.get("val_data") == "shards":
        val = open_dataset(job["folder"], size=66, resize=70)
    if job.get("val_data") == "loader":
        val = DataLoader(val, 7, shuffle=True, drop_last=False)
    if job.get("val_data") == "own way":
        val = OwnWay(val, 7)
    if job.get("val_data") == "sampler":
        val = DataLoader(val, 7, sampler=DistributedSampler(val))
    if "die_at" in job:
        _die_at(job["die_at"])
    held: dict[str, int] = {}
    if settings.get("shard"):
        _measure(held)
    save = checkpoints.save_file
    if job.get("full disk"):
        checkpoints.save_file = _no_room
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        try:
            result = recover(
                student,
                teacher,
                train=data_of(job, settings["batch_size"]),
                val=val,
                progress=job.get("progress", False),
                **settings,
            )
        except Exception as error:  # noqa: BLE001 - told to the test
            return {"error": f"{type(error).__name__}: {error}", "weights": student.state_dict()}
        finally:
            checkpoints.save_file = save
    if dist.is_initialized() and rank == 0:
        # Nothing waits for the other processes any more.
        student.eval()(points(8).tensors[0]).sum().backward()
        student.zero_grad()
    record = json.loads(json.dumps(result.to_dict()))
    return {
        "weights": student.state_dict(),
        "losses": [epoch["loss"] for epoch in record["history"]],
        "images": [epoch["images"] for epoch in record["history"]],
        "val": [record["before"], *(epoch["val"] for epoch in record["history"])],
        "kept": record["kept_epoch"],
        "held": held,
        "wrapped": type(student).__name__,
        "warnings": [str(w.message) for w in told if "was written by" in str(w.message)],
        "masks": getattr(student, "masks", [])[:3],
        "all masks": getattr(student, "masks", []),
    }


def _no_room(tensors: Any, path: Path, metadata: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _measure(held: dict[str, int]) -> None:
    """Notes how many numbers this process holds after the first update."""
    update = TrainingLoop._update

    def measuring(loop: TrainingLoop, rate: float) -> None:
        parameters: list[Any] = list(loop.student.parameters())
        held["gradients"] = sum(p.grad.to_local().numel() for p in parameters if p.grad is not None)
        update(loop, rate)
        held["parameters"] = sum(p.to_local().numel() for p in parameters)
        held["optimizer"] = sum(
            value.to_local().numel()
            for state in loop.optimizer.state.values()
            for value in state.values()
            if hasattr(value, "to_local")
        )
        TrainingLoop._update = update  # type: ignore[method-assign]

    TrainingLoop._update = measuring  # type: ignore[method-assign]


def _die_at(update: int) -> None:
    step = TrainingLoop._step

    def dying(loop: TrainingLoop, batch: Any, rate: float) -> Any:
        if loop.at.update == update:
            os.kill(os.getpid(), 9)
        return step(loop, batch, rate)

    TrainingLoop._step = dying  # type: ignore[method-assign]


def launch(folder: Path, *jobs: dict[str, Any], processes: int = 2, dies: bool = False) -> Any:
    """Runs jobs under torch.distributed.run; for each a list of what the processes ended with."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.json").write_text(json.dumps(jobs))
    done = under_torchrun(__file__, str(folder), processes=processes)
    assert (done.returncode != 0) == dies, done.stdout + done.stderr
    (folder / "output").write_text(done.stdout)
    (folder / "errors").write_text(done.stderr)
    if dies:
        return None
    return [[_read(folder / f"{k}-{rank}") for rank in range(processes)] for k in range(len(jobs))]


def loopback() -> dict[str, str]:
    """Tells gloo to talk through the loopback interface, where there is one by that name."""
    names = {name for _, name in socket.if_nameindex()}
    return {"GLOO_SOCKET_IFNAME": "lo"} if "lo" in names else {}


def under_torchrun(*program: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """Runs a Python program in several processes on the CPU, each with one thread."""
    paths = [str(Path(__file__).parents[2]), *sys.path]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONFAULTHANDLER": "1",  # says where, if torch aborts
        **loopback(),
    }
    # By number: a host's own name can't be looked up everywhere.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--local-addr", "127.0.0.1"]
    command += ["--nproc-per-node", str(processes), *program]
    for _ in range(2):
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=270, check=False
        )
        if "(SIGABRT)" not in done.stderr:
            break
        # Rare, and of torch's own threads; a mistake of ours would end the second start as well.
        warnings.warn(f"started again after:\n{done.stderr}", stacklevel=2)
    return done


def _write(path: Path, found: dict[str, Any]) -> None:
    save_file(found.pop("weights"), f"{path}.safetensors")
    Path(f"{path}.json").write_text(json.dumps(found))


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(f"{path}.json").read_text())
    return {**found, "weights": load_file(f"{path}.safetensors")}


def main(folder: str) -> None:
    rank = int(os.environ["RANK"])
    for k, job in enumerate(json.loads(Path(folder, "job.json").read_text())):
        _write(Path(folder, f"{k}-{rank}"), run(job))
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    # All is written. Now and then torch aborts while it takes its threads down.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
