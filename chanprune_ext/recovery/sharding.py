"""A network divided over all processes: each holds a slice of every weight (FSDP2)."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import InvalidArgumentError
from .weights import named_tensors

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from .processes import Processes

__all__ = [
    "check_divisible",
    "divided_like",
    "gathered_on_first",
    "hand_back",
    "own_part",
    "sharded_copy",
    "sharded_units",
]

_CONTAINERS = (nn.ModuleList, nn.Sequential)
_LARGE_LAYER = 0.01  # of all weights: a single layer of a sequence that is worth a gathering


def sharded_copy(
    what: str, model: nn.Module, device: torch.device, processes: Processes, precision: str
) -> nn.Module:
    """A copy of a network whose parameters, and so gradients and optimizer, are divided.

    Before a unit of :func:`sharded_units` runs, forward or backward, its weights are gathered, and
    freed after it. The copy begins with the weights of the first process; the network itself stays
    as and where it is, and is what :func:`hand_back` writes to.

    Args:
        what (str): ``"student"`` or ``"teacher"``, for messages.
        model (nn.Module): plain, on any device.
        device (torch.device): where the slices go.
        processes (Processes): those that share it.
        precision (str): with ``"bf16"`` weights are gathered in bfloat16, and gradients added up
            in float32. Networks with batch norm, whose layers want float32 weights, gather in
            float32 and leave bfloat16 to autocast.

    Raises:
        InvalidArgumentError: the network can't be copied, or not be divided.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    units = sharded_units(model)
    check_divisible(what, model, units)
    try:
        divided = copy.deepcopy(model)
    except Exception as error:
        raise InvalidArgumentError(
            f"shard: what is divided is a copy of the {what}, and copy.deepcopy can't copy it: "
            f"{error}"
        ) from error
    for parameter in divided.parameters():
        parameter.grad = None
        parameter.data = parameter.data.contiguous()  # slices are along dim 0
    processes.send(named_tensors(divided))
    policy = MixedPrecisionPolicy()
    normed = any(isinstance(m, nn.modules.batchnorm._NormBase) for m in divided.modules())
    if precision == "bf16" and not normed:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mesh = init_device_mesh(device.type, (processes.number,))
    for name in [*units, ""]:
        # The root too is freed after a forward: what is measured without gradients, and then looks
        # at the weights, must find its own slice.
        fully_shard(
            divided.get_submodule(name), mesh=mesh, mp_policy=policy, reshard_after_forward=True
        )
    return divided.to(device)  # buffers of modules without parameters


def sharded_units(model: nn.Module) -> list[str]:
    """Modules that are gathered on their own: the repeated blocks, the outermost first.

    A block is a member of an ``nn.ModuleList`` or ``nn.Sequential`` that has modules inside, not
    counting lists of lists, such as stages of blocks; or a single layer that holds at least one
    hundredth of all weights. Blocks inside blocks are not cut further.
    """
    whole = max(1, sum(p.numel() for p in model.parameters()))
    return [
        name
        for name, module, large in _members(model, "", False)
        if large or sum(p.numel() for p in module.parameters()) >= _LARGE_LAYER * whole
    ]


def _members(module: nn.Module, path: str, listed: bool) -> Iterator[tuple[str, nn.Module, bool]]:
    """Members of lists that have parameters, and whether each is a block, no single layer."""
    inside = [child for child in module.children() if next(child.parameters(), None) is not None]
    is_list = type(module).forward in (nn.Sequential.forward, nn.ModuleList.forward)
    is_list = isinstance(module, _CONTAINERS) and is_list
    of_blocks = is_list and any(next(child.children(), None) is not None for child in inside)
    if listed and not of_blocks and not isinstance(module, nn.ModuleList):
        yield path, module, bool(inside)
        return
    for name, child in module.named_children():
        if next(child.parameters(), None) is not None:
            yield from _members(child, f"{path}.{name}" if path else name, is_list)


def check_divisible(what: str, model: nn.Module, units: list[str]) -> None:
    """Raises InvalidArgumentError for what torch's fully_shard would not divide."""
    owner: dict[int, str] = {}
    kinds: dict[str, tuple[str, torch.dtype]] = {}
    for path, module in model.named_modules():
        unit = next((u for u in units if path == u or path.startswith(f"{u}.")), "")
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{path}.{name}".lstrip(".")
            if parameter.ndim == 0:
                raise InvalidArgumentError(
                    f"shard: the {what}'s '{full}' is a single number, which can't be divided; "
                    "make it a vector of one element"
                )
            if owner.setdefault(id(parameter), unit) != unit:
                raise InvalidArgumentError(
                    f"shard: the {what}'s '{full}' is shared by the blocks '{owner[id(parameter)]}'"
                    f" and '{unit}', whose weights are gathered at different times; train without "
                    "shard"
                )
            other, dtype = kinds.setdefault(unit, (full, parameter.dtype))
            if dtype != parameter.dtype:
                raise InvalidArgumentError(
                    f"shard: the {what}'s '{full}' is {parameter.dtype} and '{other}' is {dtype}; "
                    "expected one dtype, call .float() or .bfloat16() first"
                )


@torch.no_grad()
def hand_back(divided: nn.Module, model: nn.Module) -> None:
    """Gathers all weights and statistics of a sharded copy into the network it was made from.

    Called by all processes, which end with the same. One parameter at a time is whole on the
    device.
    """
    targets: dict[str, Any] = dict([*model.named_parameters(), *model.named_buffers()])
    for name, parameter in divided.named_parameters():
        whole: Any = parameter
        targets[name].copy_(whole.full_tensor())
    for name, buffer in divided.named_buffers():
        targets[name].copy_(buffer)


@torch.no_grad()
def gathered_on_first(
    values: Mapping[str, Tensor], parameters: Mapping[str, Any], processes: Processes
) -> dict[str, Tensor]:
    """Whole tensors, on the CPU of the first process; the others get none. Called by all.

    Args:
        values (Mapping[str, Tensor]): slices of this process, and tensors that all have alike.
        parameters (Mapping[str, DTensor]): the divided parameter that each slice is one of, or is
            shaped like; names that are missing here are of tensors that all have alike.
        processes (Processes): all of them.
    """
    found = {}
    for name, value in values.items():
        if name in parameters:
            value = divided_like(parameters[name], value).full_tensor()
        if processes.first:
            found[name] = value.detach().cpu()
    return found


def own_part(whole: Tensor, parameter: Any) -> Tensor:
    """A view of what this process holds of a tensor that is divided like ``parameter``."""
    mesh = parameter.device_mesh
    parts = whole.chunk(mesh.size())  # as fully_shard divides; there may be fewer than processes
    index = mesh.get_local_rank()
    return parts[index] if index < len(parts) else whole[:0]


def divided_like(parameter: Any, own: Tensor) -> Any:
    """The slices of all processes as one tensor, divided like ``parameter`` and of its shape."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        own,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
