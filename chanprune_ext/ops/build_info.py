"""What was built, what was loaded, and what the machine made of it."""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any

import torch

from chanprune_ext.ops._loader import CPU_MODULE, CUDA_MODULE, LoadedModule

__all__ = ["build_info"]


def _coupling() -> LoadedModule:
    name = "chanprune_ext._coupling"
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError:
        return LoadedModule(name, None, "not built")
    except ImportError as error:
        return LoadedModule(name, None, f"cannot be loaded: {error}")
    return LoadedModule(name, module.__file__, None)


def _version() -> str:
    try:
        return importlib.metadata.version("chanprune_ext")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def build_info() -> dict[str, Any]:
    """Collects the facts about the native modules.

    Returns:
        A dict of plain values: ``version``, ``torch`` (running), ``modules`` (name -> file, or why
        it is not loaded), ``cpu`` and ``cuda`` (whether native kernels serve these devices),
        ``simd_level`` ("default", "x86-64-v3" or "x86-64-v4"; the clone this machine runs; None
        without the CPU module), ``compiler``, ``target_torch`` (oldest torch the build runs on),
        ``built_with_torch``, ``cuda_toolkit`` and ``cuda_archs`` (of the CUDA module, or None).
    """
    modules = {
        module.name: module.path if module.loaded else module.problem
        for module in (CPU_MODULE, CUDA_MODULE, _coupling())
    }
    info: dict[str, Any] = {
        "version": _version(),
        "torch": torch.__version__,
        "modules": modules,
        "cpu": CPU_MODULE.loaded,
        "cuda": CUDA_MODULE.loaded,
        "simd_level": None,
        "compiler": None,
        "target_torch": None,
        "built_with_torch": None,
        "cuda_toolkit": None,
        "cuda_archs": None,
    }
    if CPU_MODULE.loaded:
        facts = dict(line.split("=", 1) for line in torch.ops.chanprune.build_facts().splitlines())
        info["simd_level"] = torch.ops.chanprune.simd_level()
        info["compiler"] = facts["compiler"]
        info["target_torch"] = facts["target_torch"]
        info["built_with_torch"] = facts["built_with_torch"]
    if CUDA_MODULE.loaded:
        facts = dict(
            line.split("=", 1) for line in torch.ops.chanprune.cuda_build_facts().splitlines()
        )
        info["cuda_toolkit"] = facts["toolkit"]
        info["cuda_archs"] = facts["archs"].split(",")
    return info
