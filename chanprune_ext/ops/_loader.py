"""Loads the compiled operator modules; never compiles, never fails the import of the package."""

from __future__ import annotations

import importlib
import os
import warnings
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING

import torch
from torch._C import _are_functorch_transforms_active, _functorch
from torch.autograd import forward_ad

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

__all__ = [
    "CPU_MODULE",
    "CUDA_MODULE",
    "LoadedModule",
    "differentiates",
    "inside_transform",
    "native_available",
    "native_disabled",
    "works_in_place",
]

_BUILD_COMMAND = "pip install --no-build-isolation -e ."
_REQUIRES_GRAD = attrgetter("requires_grad")
_BUILD_NEEDS = "setuptools>=77, pybind11 and ninja"  # as in pyproject.toml


@dataclass(frozen=True)
class LoadedModule:
    """What became of one compiled module.

    Attributes:
        name: import name.
        path: file it was loaded from, or None.
        problem: why it is not loaded, or None.
    """

    name: str
    path: str | None
    problem: str | None

    @property
    def loaded(self) -> bool:
        """Whether its operators are registered."""
        return self.path is not None


def native_disabled() -> bool:
    """Whether the environment variable CHANPRUNE_DISABLE_NATIVE asks for the references."""
    return os.environ.get("CHANPRUNE_DISABLE_NATIVE", "0") not in ("", "0")


def _load(name: str) -> LoadedModule:
    if native_disabled():
        return LoadedModule(name, None, "switched off by CHANPRUNE_DISABLE_NATIVE")
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError:
        return LoadedModule(name, None, "not built")
    except ImportError as error:
        return LoadedModule(name, None, f"cannot be loaded: {error}")
    return LoadedModule(name, module.__file__, None)


def _load_all() -> tuple[LoadedModule, LoadedModule]:
    cpu = _load("chanprune_ext._C")
    if not cpu.loaded:
        # Without the schemas of the CPU module the CUDA kernels have nothing to attach to.
        cuda = LoadedModule("chanprune_ext._C_cuda", None, "needs chanprune_ext._C")
    elif torch.version.cuda is None:
        cuda = LoadedModule("chanprune_ext._C_cuda", None, "this torch is a CPU build")
    else:
        cuda = _load("chanprune_ext._C_cuda")
    if native_disabled():
        return cpu, cuda
    module = cuda if cpu.loaded else cpu
    broken = module.problem is not None and module.problem.startswith("cannot")
    if not cpu.loaded or broken or (torch.cuda.is_available() and not cuda.loaded):
        warnings.warn(
            f"{module.name} is not in use: {module.problem} (torch {torch.__version__}); slower "
            f"pure-torch code runs instead until you build it with `{_BUILD_COMMAND}` (which needs "
            f"{_BUILD_NEEDS}).",
            stacklevel=2,
        )
    return cpu, cuda


CPU_MODULE, CUDA_MODULE = _load_all()


def native_available(tensor: Tensor) -> bool:
    """Whether compiled kernels serve tensors like `tensor`; meta tensors go through the fakes."""
    # Not by tensor.device.type: making that text takes a good part of a small call.
    if tensor.is_cpu or tensor.is_meta:
        return CPU_MODULE.loaded
    return tensor.is_cuda and CUDA_MODULE.loaded


def inside_transform() -> bool:
    """Whether torch.func or forward-mode differentiation runs: custom operators know neither."""
    level: int = forward_ad._current_level  # noqa: SLF001
    return _are_functorch_transforms_active() or level >= 0


def differentiates(tensors: Iterable[Tensor]) -> bool:
    """Whether autograd records what is done with any of `tensors`."""
    return torch.is_grad_enabled() and any(map(_REQUIRES_GRAD, tensors))


def works_in_place(tensor: Tensor) -> bool:
    """Whether it holds plain values, which may be read: it is neither traced, faked nor batched."""
    return type(tensor) is torch.Tensor and not (
        _functorch.is_batchedtensor(tensor) or _functorch.is_legacy_batchedtensor(tensor)
    )
