"""Runs the CUDA kernels and their host code on the CPU, by the operator tests, without a GPU.

A copy of the package is built whose operators, called with CPU tensors, do what those of the CUDA
module do with CUDA tensors: the sources in csrc/cuda are compiled by the C++ compiler against the
headers in csrc/cuda_emulation, with ``kernel<<<...>>>(...)`` rewritten as a call. Indices, tails,
alignment, barriers, launch extents, tables and dispatch are then those of the GPU; its rounding,
its memory model and its speed are not. Usage::

    python tools/emulate_cuda.py [--sanitize] [pytest arguments]

Exit status: that of pytest, or 1 if something does not compile.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from package_copy import SANITIZERS, compiler, copy_package, run_pytest, sanitizer_environment

SOURCES = ("csrc/*.cpp", "csrc/cpu/build_facts.cpp", "csrc/cuda_emulation/*.cpp", "csrc/cuda/*")
LEFT_OUT = ("module.cpp", "build_facts.cu")  # of csrc/cuda: the CUDA module itself
TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # as in setup.py
# On CUDA nobody looks at the values of labels, which would wait for the device.
OTHERWISE_ON_CUDA = (
    "test_out_of_range_labels_are_named",
    "test_operator_itself_refuses_bad_arguments[arguments4-got 3 at row 1]",
)
TESTED = ("channel_norms", "slice_channels", "kd_kl_div", "huge", "cuda_emulation")
LAUNCH = re.compile(r"([A-Za-z_]\w*(?:<[^<>;(){}]*>)?)\s*<<<(.*?)>>>\s*\(", re.DOTALL)


def translated(source: str) -> str:
    """C++ for the CPU out of CUDA C++."""
    source = LAUNCH.sub(r"cuda_emulation::launch(\1, \2)(", source)
    return source.replace("LIBRARY_IMPL(chanprune, CUDA,", "LIBRARY_IMPL(chanprune, CPU,")


def build(folder: Path, flags: list[str]) -> bool:
    """Compiles and links chanprune_ext/_C in the copy; False if something does not compile."""
    torch_home = Path(torch.__file__).parent
    includes = ["-Icsrc/cuda_emulation", "-Icsrc", "-isystem", str(torch_home / "include")]
    includes.append(f"-I{sysconfig.get_paths()['include']}")
    common = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]
    commands, objects = [], []
    for pattern in SOURCES:
        for file in sorted(folder.glob(pattern)):
            if file.suffix not in (".cu", ".cpp"):
                continue
            if file.parent.name == "cuda":
                if file.name in LEFT_OUT:
                    continue
                file.write_text(translated(file.read_text()))
            objects.append(f"{file}.o")
            language = ["-x", "c++", "-c", str(file.relative_to(folder)), "-o", objects[-1]]
            if file.suffix == ".cu":  # nvcc includes it unasked
                language = ["-include", "cuda_runtime.h", *language]
            commands.append([compiler(), *common, *flags, TARGET, *includes, *language])
    library = f"-L{torch_home / 'lib'}"
    module = ["-shared", *objects, "-o", "chanprune_ext/_C.abi3.so"]
    link = [compiler(), *flags, *module, library, "-lc10", "-ltorch", "-ltorch_cpu"]

    def run(command: list[str]) -> bool:
        return subprocess.run(command, cwd=folder, check=False).returncode == 0

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return all(list(pool.map(run, commands))) and run(link)


def main() -> int:
    """Builds and tests."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sanitize", action="store_true", help="with AddressSanitizer and UBSan")
    options, pytest_arguments = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_package(folder)
        if not build(folder, list(SANITIZERS) if options.sanitize else ["-O2"]):
            return 1
        tests = [f"tests/ops/test_{part}.py" for part in TESTED]
        tests += [f"--deselect=tests/ops/test_kd_kl_div.py::{test}" for test in OTHERWISE_ON_CUDA]
        environment = sanitizer_environment() if options.sanitize else {}
        return run_pytest(folder, [*tests, *pytest_arguments], environment)


if __name__ == "__main__":
    sys.exit(main())
