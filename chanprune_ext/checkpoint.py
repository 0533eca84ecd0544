"""Saving a pruned network in one file, and getting it back from the unpruned class.

The file is a plain safetensors file: any reader sees the tensors. Its metadata carry the pruning
plan as JSON, from which :func:`load` rebuilds the narrow architecture. Nothing in it is code, and
nothing is unpickled.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import pickle
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .atomic_files import write_atomically
from .errors import CheckpointError, InvalidArgumentError, PlanMismatchError
from .module_tree import plain_module

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .plan import PruningPlan

__all__ = ["load", "load_weights", "save"]

FORMAT = "chanprune"
VERSION = 2
# Batch norm counts its batches in a buffer that many published files leave out.
OPTIONAL_SUFFIX = "num_batches_tracked"
# What a module's get_extra_state returned stands under this name, and goes to set_extra_state.
EXTRA_STATE = "_extra_state"
# Of what wraps a whole network: DataParallel, and torch.compile.
_WRAPPERS = ("module.", "_orig_mod.")
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    built_from: Mapping[str, Any] | None = None,
) -> None:
    """Writes a model, pruned or not, as one safetensors file, whole or not at all.

    Args:
        model (nn.Module): the model; its state dict must hold nothing but tensors. Tensors that
            share their memory (tied weights) are stored once. Of a model that DataParallel,
            DistributedDataParallel or torch.compile has wrapped, the one inside is saved.
        path (str or PathLike): the file; an existing one is replaced.
        built_from (Mapping, optional): how the command line names the plain model
            (``{"model": "torchvision:resnet50", "arguments": {}}``), so that its other commands
            need not be told.

    Raises:
        InvalidArgumentError: the state dict holds something that safetensors can't, or an argument
            is of the wrong kind.
        OutputError: the file can't be written; a file that was there is as it was.
    """
    from .plan import plans_of

    _check_arguments(path, model, "model", "save(model, path)")
    model = plain_module(model)
    tensors, aliases = without_duplicates(model.state_dict())
    metadata = description(model, aliases, plans_of(model))
    if built_from is not None:
        metadata["built_from"] = json.dumps(dict(built_from))
    write_atomically(path, lambda file: save_file(tensors, file, metadata))


def description(
    model: nn.Module, aliases: Mapping[str, str], plans: Sequence[PruningPlan]
) -> dict[str, str]:
    """What :func:`save` writes beside the tensors: names that share memory, and the plans.

    Plans of parts that were pruned on their own stand apart: they fit their part alone.
    """
    from .plan import plans_within

    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "aliases": json.dumps(aliases),
    }
    if plans:
        metadata["plans"] = json.dumps([plan.to_dict() for plan in plans])
    within = {
        path: [plan.to_dict() for plan in found]
        for path, found in plans_within(model).items()
        if path
    }
    if within:
        metadata["plans_within"] = json.dumps(within)
    return metadata


def load(path: str | os.PathLike[str], plain_model: nn.Module) -> nn.Module:
    """Rebuilds a saved model from an unpruned one of the same class.

    Args:
        path (str or PathLike): a file written by :func:`save`.
        plain_model (nn.Module): the architecture before pruning, with any weights; it is not
            changed. Of a model whose parts were pruned on their own, parts may be pruned already.

    Returns:
        nn.Module: a new model with the saved widths, weights and dtypes, on the devices of
        ``plain_model``.

    Raises:
        CheckpointError: the file is missing, truncated or foreign, or belongs to another
            architecture; the message names the first difference.
        InvalidArgumentError: an argument is of the wrong kind, or the model on the meta device.
    """
    from .plan import PruningPlan

    _check_arguments(path, plain_model, "plain_model", "load(path, plain_model)")
    _refuse_meta(plain_model, "plain_model")
    path = Path(path)
    tensors, metadata = read_safetensors(path)
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: not written by chanprune_ext.save; read plain weights with load_weights"
        )
    if metadata.get("version") != str(VERSION):
        raise CheckpointError(
            f"{path}: has format version {metadata.get('version')}, this release reads {VERSION}"
        )
    try:
        _add_aliases(tensors, metadata)
        plans = {
            where: [PruningPlan.from_dict(p) for p in found]
            for where, found in _plans_by_path(metadata).items()
        }
    except (ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}: its description is damaged: {error}") from error
    try:
        model = _narrowed(plain_model, plans)
    except PlanMismatchError as error:
        raise CheckpointError(
            f"{path}: holds a pruned {metadata.get('class')}, which plain_model does not become: "
            f"{error}"
        ) from error
    targets = _state_of(model)
    _check_fit(path, targets, tensors)
    for name, value in tensors.items():
        if targets[name].dtype != value.dtype:
            targets[name].data = targets[name].data.to(value.dtype)
    _fill(model, targets, tensors)
    return model


def _fill(model: nn.Module, targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Puts values that fit into a model."""
    # First what a module may refuse: then nothing has changed yet.
    for name, value in tensors.items():
        if _is_extra_state(name):
            model.get_submodule(name.rpartition(".")[0]).set_extra_state(value)
    with torch.no_grad():
        for name, value in tensors.items():
            if not _is_extra_state(name):
                targets[name].copy_(value)


def _is_extra_state(name: str) -> bool:
    return name.rpartition(".")[2] == EXTRA_STATE


def _refuse_meta(model: nn.Module, argument: str) -> None:
    """Raises InvalidArgumentError where values would be copied into tensors that hold none."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise InvalidArgumentError(
                f"{argument}: its {name!r} is on the meta device, which holds no values; build the "
                "model on the CPU"
            )


def _check_arguments(path: object, model: object, model_name: str, call: str) -> None:
    """Refuses what is no path and no model, also where the two are exchanged."""
    if isinstance(model, type):
        raise InvalidArgumentError(
            f"{model_name}: expected a model, got the class {model.__name__}; make one of it first"
        )
    if not isinstance(model, nn.Module):
        raise InvalidArgumentError(
            f"{model_name}: expected a torch.nn.Module, got {type(model).__name__}; call {call}"
        )
    if not isinstance(path, str | os.PathLike):
        raise InvalidArgumentError(
            f"path: expected the path of a file, got {type(path).__name__}; call {call}"
        )


def _plans_by_path(metadata: Mapping[str, str]) -> dict[str, list[Any]]:
    """Path of a module -> the plans of a file that were made for it; "" is the model itself."""
    found = {"": json.loads(metadata.get("plans", "[]"))}
    found.update(json.loads(metadata.get("plans_within", "{}")))
    return {path: plans for path, plans in found.items() if plans}


def _narrowed(plain_model: nn.Module, plans: Mapping[str, Sequence[PruningPlan]]) -> nn.Module:
    """A copy of a model, pruned by all the plans.

    Raises:
        PlanMismatchError: a plan fits at no time.
    """
    if plans.keys() == {""}:
        model = plain_model
        for plan in plans[""]:
            model = plan.apply(model)
        return model
    model = copy.deepcopy(plain_model)
    waiting = {
        path: list(found)
        for path, found in plans.items()
        if not path or not _is_pruned(model, path)
    }
    while waiting:
        path = _next_path(model, waiting)
        waiting[path].pop(0).apply(model.get_submodule(path), inplace=True)
        waiting = {path: left for path, left in waiting.items() if left}
    return model


def _is_pruned(model: nn.Module, path: str) -> bool:
    from .plan import plans_of

    try:
        return bool(plans_of(model.get_submodule(path)))
    except AttributeError:
        raise PlanMismatchError(f"it has no module '{path}', which was pruned on its own") from None


def _next_path(model: nn.Module, waiting: Mapping[str, Sequence[PruningPlan]]) -> str:
    """The module whose next plan was made for the model as it is now.

    An outer module comes before its parts: its plan knows their widths, theirs do not know its.
    """
    first: PlanMismatchError | None = None
    for path in sorted(waiting, key=len):
        try:
            waiting[path][0].check(model.get_submodule(path))
        except PlanMismatchError as error:
            first = first or error
        else:
            return path
    assert first is not None
    raise first


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Reads plain weights, as the rest of the world saves them, into ``model``.

    Args:
        model (nn.Module): receives the weights, in its own dtype and on its own device.
        path (str or PathLike): ``.safetensors``, or what ``torch.save`` wrote: a state dict, also
            under the key ``state_dict``, ``model_state_dict`` or ``model``, also with the prefix
            ``module.`` or ``_orig_mod.``. Batch counters (``num_batches_tracked``) may be missing.

    Returns:
        nn.Module: ``model``.

    Raises:
        CheckpointError: the file is missing, truncated, holds other things than tensors, or does
            not fit; the message names the first difference, and the model is as it was.
        InvalidArgumentError: the model is on the meta device.
    """
    _refuse_meta(model, "model")
    path = Path(path)
    if path.suffix == ".safetensors":
        tensors, metadata = read_safetensors(path)
        if metadata.keys() & {"plans", "plans_within"}:
            raise CheckpointError(
                f"{path}: holds a pruned model; read it with chanprune_ext.load(path, plain_model)"
            )
        if metadata.get("format") == FORMAT:
            _add_aliases(tensors, metadata)
    else:
        tensors = _read_pickled(path)
    inner = plain_module(model)
    targets = _state_of(inner)
    for name, target in targets.items():
        if name.endswith(OPTIONAL_SUFFIX):
            tensors.setdefault(name, target.detach())
    _check_fit(path, targets, tensors)
    _fill(inner, targets, tensors)
    return model


def shared_names(state: Mapping[str, Any]) -> dict[str, str]:
    """Names of tensors that are the same memory as an earlier one -> name of that one.

    Raises:
        InvalidArgumentError: an entry is no tensor.
    """
    aliases: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise InvalidArgumentError(
                f"model: its state dict entry {name!r} is a {type(tensor).__name__}; only tensors "
                "can be saved"
            )
        # On the meta device every address is 0: there the objects themselves tell.
        place = id(tensor) if tensor.is_meta else tensor.data_ptr()
        key = (tensor.device, place, tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and key in first:
            aliases[name] = first[key]
        else:
            first[key] = name
    return aliases


def without_duplicates(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors to store, and the names of those that are the same memory as a stored one."""
    aliases = shared_names(state)
    tensors: dict[str, Tensor] = {}
    stored: set[tuple[torch.device, int]] = set()
    for name, tensor in state.items():
        if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized:
            raise InvalidArgumentError(
                f"model: its state dict entry {name!r} is a meta, sparse or quantised tensor, "
                "which can't be saved; load the weights or convert it first"
            )
        if name not in aliases:
            # A copy of what is part of something, or another view of what is stored already:
            # safetensors refuses tensors that share memory.
            dense = tensor.contiguous()
            storage = dense.untyped_storage()
            place = (dense.device, storage.data_ptr())
            alone = storage.nbytes() == dense.nbytes and place not in stored
            tensors[name] = dense if alone else dense.clone()
            stored.add(place)
    return tensors, aliases


def _add_aliases(tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> None:
    aliases = json.loads(metadata.get("aliases", "{}"))
    tensors.update({alias: tensors[name] for alias, name in aliases.items()})


def read_description(path: str | os.PathLike[str]) -> dict[str, str]:
    """What a file of :func:`save` says of itself, without its tensors.

    Raises:
        CheckpointError: the file is missing, truncated or foreign.
    """
    path = Path(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from error
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: not written by chanprune_ext.save; read plain weights with load_weights"
        )
    return dict(metadata)


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path}: can't be read as a safetensors file ({error}); it is missing, truncated or "
        "of another kind"
    )


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from error


def _read_pickled(path: Path) -> dict[str, Tensor]:
    try:
        # torchvision's training script stores its command line beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        reason = _COLOURS.sub("", first_line)
        raise CheckpointError(
            f"{path}: can't be read as weights ({reason}); it is missing, truncated, or holds "
            "other things than tensors: save model.state_dict() alone"
        ) from error
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{path}: expected a state dict, got {type(content).__name__}")
    for name, value in content.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path}: expected tensors in the state dict, {name!r} is {type(value).__name__}"
            )
    return _unwrapped(content)


def _unwrapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with the names of the network inside, where it is that of a wrapped one."""
    for prefix in _WRAPPERS:
        if all(name.startswith(prefix) for name in state):
            return _unwrapped({name.removeprefix(prefix): state[name] for name in state})
    return dict(state)


def _state_of(model: nn.Module) -> dict[str, Tensor]:
    """The state dict's own tensors, not copies, without what modules add that is no tensor."""
    state = model.state_dict(keep_vars=True)
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _check_fit(path: Path, targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError for the first entry that is missing, different or left over."""
    for name, target in targets.items():
        if name not in tensors:
            raise CheckpointError(f"{path}: has no {name!r}, which the model needs")
        if _is_extra_state(name):  # whether it fits is for the module to say
            continue
        found = tensors[name]
        if found.shape != target.shape:
            raise CheckpointError(
                f"{path}: {name!r} has shape {list(found.shape)}, the model expects "
                f"{list(target.shape)}"
            )
        if found.is_floating_point() != target.is_floating_point():
            raise CheckpointError(
                f"{path}: {name!r} has dtype {found.dtype}, the model expects {target.dtype}"
            )
    for name in tensors:
        if name not in targets:
            raise CheckpointError(f"{path}: holds {name!r}, which the model does not have")
