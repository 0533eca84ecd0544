"""Builds the native modules; all metadata live in pyproject.toml.

Environment:
    FORCE_CUDA            "1" builds the CUDA module or fails, "0" never builds it. Default: built
                          when torch is a CUDA build and an nvcc of the same major version is found.
                          Anything else is refused.
    TORCH_CUDA_ARCH_LIST  CUDA architectures; default: those of the visible GPUs, else
                          "8.0;9.0+PTX".
    CHANPRUNE_CXX_FLAGS   extra compiler and linker flags of the C++ modules, for example
                          "-fsanitize=address -DCHANPRUNE_NO_CLONES".
    MAX_JOBS              compiler processes at a time; default: one per core, at most 8.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
import torch
from setuptools import Extension, setup

# The oldest torch the tensor modules run on; the stable ABI makes one build serve all later ones.
TORCH_TARGET = "0x020b000000000000"  # 2.11
FALLBACK_ARCHS = "8.0;9.0+PTX"

CHECKS_AND_PLANS = ["csrc/channel_norms.cpp", "csrc/slice_channels.cpp", "csrc/kd_kl_div.cpp"]
CPU_SOURCES = [
    *CHECKS_AND_PLANS,
    "csrc/module.cpp",
    "csrc/cpu/build_facts.cpp",
    "csrc/cpu/channel_norms.cpp",
    "csrc/cpu/slice_channels.cpp",
    "csrc/cpu/kd_kl_div.cpp",
]
CUDA_SOURCES = [
    *CHECKS_AND_PLANS,
    "csrc/cuda/module.cpp",
    "csrc/cuda/build_facts.cu",
    "csrc/cuda/channel_norms.cu",
    "csrc/cuda/channel_norms_host.cpp",
    "csrc/cuda/slice_channels.cu",
    "csrc/cuda/slice_channels_host.cpp",
    "csrc/cuda/kd_kl_div.cu",
    "csrc/cuda/kd_kl_div_host.cpp",
]
COUPLING_SOURCES = [
    "csrc/coupling/label_store.cpp",
    "csrc/coupling/label_views.cpp",
    "csrc/coupling/bindings.cpp",
]

FORCE_CUDA = os.environ.get("FORCE_CUDA", "")
if FORCE_CUDA not in ("", "0", "1"):
    raise SystemExit(f"FORCE_CUDA should be 0, 1 or not set, got {FORCE_CUDA!r}")

EXTRA_FLAGS = os.environ.get("CHANPRUNE_CXX_FLAGS", "").split()
CXX_FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-g0"]
CXX_FLAGS.append("-Wno-psabi")  # vectors are passed between inlined functions only


def find_cuda_home() -> Path | None:
    """The toolkit folder: CUDA_HOME, or where the nvcc on PATH really lies."""
    if home := os.environ.get("CUDA_HOME"):
        return Path(home)
    if nvcc := shutil.which("nvcc"):
        # nvcc on PATH may be a link or a small wrapper script outside the toolkit: ask nvcc itself.
        listing = subprocess.run(
            [nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False
        )
        if here := re.search(r"^#\$ _HERE_=(.*)$", listing.stderr, re.MULTILINE):
            return Path(here.group(1)).resolve().parent
    default = Path("/usr/local/cuda")
    return default if (default / "bin" / "nvcc").exists() else None


def toolkit_version(home: Path) -> str:
    """The release of the toolkit's nvcc, e.g. "13.0"."""
    text = subprocess.run(
        [home / "bin" / "nvcc", "--version"], capture_output=True, text=True, check=True
    ).stdout
    found = re.search(r"release (\d+\.\d+)", text)
    if found is None:
        raise RuntimeError(f"cannot read a release number from {home}/bin/nvcc --version")
    return found.group(1)


def reason_against_cuda(home: Path | None) -> str | None:
    """Why the CUDA module is not built, or None when it can be."""
    if FORCE_CUDA == "0":
        return "FORCE_CUDA=0"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a CPU build"
    if home is None:
        return "no CUDA toolkit found (set CUDA_HOME or put nvcc on PATH)"
    if not (home / "bin" / "nvcc").is_file():
        return f"no nvcc in {home}/bin (check CUDA_HOME)"
    release = toolkit_version(home)
    if release.split(".")[0] != torch.version.cuda.split(".")[0]:
        return f"nvcc is {release} but torch was built with CUDA {torch.version.cuda}"
    return None


def native_extensions() -> list[Extension]:
    """The modules to build on this machine."""
    home = find_cuda_home()
    if home is not None:
        os.environ["CUDA_HOME"] = str(home)  # read by torch.utils.cpp_extension when imported
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    target = f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"
    extensions = [
        CppExtension(
            "chanprune_ext._C",
            CPU_SOURCES,
            include_dirs=[str(Path("csrc").resolve())],
            extra_compile_args={"cxx": [*CXX_FLAGS, target, *EXTRA_FLAGS]},
            extra_link_args=["-s", *EXTRA_FLAGS],
            py_limited_api=True,
        ),
        Extension(
            "chanprune_ext._coupling",
            COUPLING_SOURCES,
            include_dirs=[pybind11.get_include(), str(Path("csrc").resolve())],
            extra_compile_args={"cxx": ["-std=c++17", *CXX_FLAGS, *EXTRA_FLAGS]},
            extra_link_args=["-s", *EXTRA_FLAGS],
            language="c++",
        ),
    ]
    against = reason_against_cuda(home)
    if against is not None:
        if FORCE_CUDA == "1":
            raise RuntimeError(f"FORCE_CUDA=1, but the CUDA module cannot be built: {against}")
        print(f"chanprune_ext: CUDA module not built: {against}", file=sys.stderr)
        return extensions
    if not torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", FALLBACK_ARCHS)
    extensions.append(
        CUDAExtension(
            "chanprune_ext._C_cuda",
            CUDA_SOURCES,
            include_dirs=[str(Path("csrc").resolve())],
            extra_compile_args={
                "cxx": [*CXX_FLAGS, target, "-DUSE_CUDA", *EXTRA_FLAGS],
                "nvcc": ["-O3", "-Xcompiler", "-fvisibility=hidden"],
            },
            extra_link_args=["-s"],
            py_limited_api=True,
        )
    )
    return extensions


def build_command() -> type:
    from torch.utils.cpp_extension import BuildExtension

    os.environ.setdefault("MAX_JOBS", str(min(8, len(os.sched_getaffinity(0)))))
    return BuildExtension.with_options(use_ninja=True)


setup(ext_modules=native_extensions(), cmdclass={"build_ext": build_command()})
