"""The processes that train one network together, and what they tell each other."""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import ChanpruneError, InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from accelerate import Accelerator

__all__ = [
    "Processes",
    "is_first_process",
    "launched_processes",
    "leave_processes",
    "make_accelerator",
    "prepared",
    "require_gradients",
]

T = TypeVar("T")

_OTHER_ENGINES = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}


def launched_processes() -> int:
    """How many processes ``torchrun`` or ``accelerate launch`` has started; 1 without them."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_process() -> bool:
    """Whether this process prints and writes; also before the processes have found each other."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return int(os.environ.get("RANK", "0")) == 0


def leave_processes() -> None:
    """Parts from the other processes, as a program does at its end."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def make_accelerator(device: torch.device) -> Accelerator:
    """The handle of accelerate on this process, which joins the others of its launcher.

    Args:
        device (torch.device): where to train; a CPU makes the processes talk through gloo.

    Raises:
        InvalidArgumentError: the processes were started in a way that accelerate does not see, or
            for an engine that shards the network.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    wanted = launched_processes()
    for variable, engine in _OTHER_ENGINES.items():
        if os.environ.get(variable, "false").lower() == "true":
            raise InvalidArgumentError(
                f"recover: the launcher asks for {engine}, which recovery does not hand over to. "
                "Start it with torchrun, or with 'accelerate launch --multi_gpu'; for a network "
                "that is divided over the processes (FSDP2) add shard=True"
            )
    # Running statistics are averaged where they are looked at: cheaper than to send those of the
    # first process before every forward, and of the images of all of them.
    options = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    accelerator = Accelerator(
        device_placement=False,
        cpu=wanted > 1 and device.type == "cpu",
        kwargs_handlers=[options],
    )
    if accelerator.num_processes != wanted:
        raise InvalidArgumentError(
            f"recover: expected {wanted} processes as torch.distributed says, accelerate knows of "
            f"{accelerator.num_processes}; start the script with torchrun or accelerate launch, "
            f"and make no other Accelerator than for '{device.type}' before"
        )
    if wanted > 1 and accelerator.device.type != device.type:
        raise InvalidArgumentError(
            f"device: expected {accelerator.device.type!r}, which these processes were set up "
            f"for, got {device.type!r}; use one kind of device in one script"
        )
    accelerator.gradient_accumulation_steps = 1  # the loop accumulates, whatever the launcher says
    return accelerator


def prepared(
    accelerator: Accelerator,
    student: nn.Module,
    optimizer: torch.optim.Optimizer,
    sharded: bool = False,
) -> tuple[Any, Any]:
    """The student and its optimizer as accelerate trains them, the same in all processes."""
    if sharded:  # talks to the other processes itself
        return student, accelerator.prepare(optimizer)
    with warnings.catch_warnings():
        # The name that torch is to give this option is not known to its releases until now.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        model, wrapped = accelerator.prepare(student, optimizer)
    # Parameters are sent by DistributedDataParallel, buffers are not.
    Processes(accelerator).send(dict(student.named_buffers()))
    return model, wrapped


def require_gradients(student: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Checks after a backward that DistributedDataParallel got what it waits for.

    Raises:
        InvalidArgumentError: a trained parameter has no gradient.
    """
    if any(p.grad is None for group in optimizer.param_groups for p in group["params"]):
        without = [n for n, p in student.named_parameters() if p.requires_grad and p.grad is None]
        named = ", ".join(f"'{name}'" for name in without[:4])
        more = f" and {len(without) - 4} more" if len(without) > 4 else ""
        raise InvalidArgumentError(
            f"student: the loss gives {named}{more} no gradient, and several processes wait for "
            "one of every parameter that is trained; call requires_grad_(False) on what the loss "
            "does not reach, an auxiliary head, say, which one process would leave as it is"
        )


class Processes:
    """All processes of a run as seen from one of them. With one process nothing is sent.

    Except for :meth:`same`, every method must be called by all processes at the same point.

    Attributes:
        number (int): how many there are.
        index (int): which one this is, from 0.
        first (bool): whether this is the one that prints and writes.

    Args:
        accelerator (Accelerator): from :func:`make_accelerator`.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.number: int = accelerator.num_processes
        self.index: int = accelerator.process_index
        self.first = self.index == 0
        self._device: torch.device = accelerator.device

    def gathered(self, value: T) -> list[T]:
        """What each process has passed, in their order."""
        if self.number == 1:
            return [value]
        found: list[Any] = [None] * self.number
        dist.all_gather_object(found, value)
        return found

    def told(self, value: T) -> T:
        """What the first process has passed."""
        if self.number == 1:
            return value
        holder: list[Any] = [value if self.first else None]
        dist.broadcast_object_list(holder, src=0)
        return value if self.first else holder[0]

    def sums(self, *values: float) -> list[float]:
        """Sums over all processes, in float64 and the same on each of them to the last bit."""
        if self.number == 1:
            return list(values)
        own = torch.tensor(values, dtype=torch.float64, device=self._device)
        parts = [torch.empty_like(own) for _ in range(self.number)]
        dist.all_gather(parts, own)
        return torch.stack(parts).sum(0).tolist()

    def first_alone(self, call: Callable[[], T]) -> T:
        """Lets the first process call; all get what it returns, or raise what it raises."""
        if self.number == 1:
            return call()
        outcome: tuple[Any, ChanpruneError | None] = (None, None)
        if self.first:
            try:
                outcome = (call(), None)
            except ChanpruneError as error:
                outcome = (None, error)
        value, failure = self.told(outcome)
        if failure is not None:
            raise failure
        return value

    def require_same(self, what: str, model: nn.Module) -> None:
        """Raises InvalidArgumentError unless all processes hold the same weights."""
        if self.number == 1:
            return
        own = [p.detach().double().sum().item() for p in model.parameters()]
        for index, other in enumerate(self.gathered(own)):
            if len(own) != len(other) or not torch.allclose(
                torch.tensor(own, device="cpu"),
                torch.tensor(other, device="cpu"),
                rtol=1e-6,
                equal_nan=True,
            ):
                raise InvalidArgumentError(
                    f"{what}: expected the same weights in all processes, those of process {index} "
                    "are others; load them from one file, or seed before making the network"
                )

    @torch.no_grad()
    def even_out(self, model: nn.Module, values: Mapping[str, Tensor]) -> None:
        """Makes tensors that belong to a model's buffers the same in all processes.

        Running means and variances become the average over the processes, each of which has seen
        other images; all other buffers become those of the first process.

        Args:
            model (nn.Module): whose modules say which buffers are running statistics.
            values (Mapping[str, Tensor]): the tensors by the buffers' names, changed in place.
        """
        if self.number == 1:
            return
        statistics = set(running_statistics(model))
        buffers = [name for name, _ in model.named_buffers() if name in values]
        averaged = [values[name] for name in buffers if name in statistics]
        for part in _by_dtype(averaged):
            flat = torch.cat([tensor.reshape(-1) for tensor in part])
            dist.all_reduce(flat)
            _unflatten(flat / self.number, part)
        self._send([values[name] for name in buffers if name not in statistics])

    @torch.no_grad()
    def send(self, values: Mapping[str, Tensor]) -> None:
        """Overwrites tensors by those of the first process."""
        if self.number > 1:
            self._send(list(values.values()))

    def _send(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            # A copy: a view or an expanded tensor can't be received into.
            # On the device: the processes may have no other way to talk.
            received = tensor.detach().to(self._device, copy=True).contiguous()
            dist.broadcast(received, src=0)
            tensor.copy_(received)


def running_statistics(model: nn.Module) -> list[str]:
    """Names of the running means and variances of normalisation layers."""
    return [
        f"{path}.{name}".lstrip(".")
        for path, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._NormBase)
        for name in ("running_mean", "running_var")
        if getattr(module, name) is not None
    ]


def _by_dtype(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    dtypes = dict.fromkeys(tensor.dtype for tensor in tensors)
    return [[tensor for tensor in tensors if tensor.dtype == dtype] for dtype in dtypes]


def _unflatten(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    sizes = [tensor.numel() for tensor in tensors]
    for tensor, part in zip(tensors, torch.split(flat, sizes), strict=True):
        tensor.copy_(part.view_as(tensor))
