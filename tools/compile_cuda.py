"""Compiles every CUDA source with all warnings as errors, without linking or running anything.

Works with any torch, a CPU build too, wherever a CUDA toolkit is: a change that breaks the CUDA
module is then seen on machines without a GPU. Usage::

    python tools/compile_cuda.py [--archs 80,90] [--if-available]

Exit status 0: all compiled, or, with --if-available, no nvcc on PATH or in CUDA_HOME.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # as in setup.py


def find_nvcc() -> str | None:
    """The nvcc of CUDA_HOME, else the one on PATH."""
    if home := os.environ.get("CUDA_HOME"):
        return shutil.which("nvcc", path=str(Path(home) / "bin"))
    return shutil.which("nvcc")


def toolkit_includes(nvcc: str) -> list[str]:
    """The include flags nvcc itself uses, for the host compiler."""
    listing = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False
    ).stderr
    found = re.search(r"^#\$ INCLUDES=(.*)$", listing, re.MULTILINE)
    return re.findall(r'"(-I[^"]+)"', found.group(1)) if found else []


def torch_includes() -> list[str]:
    """The include flags of the installed torch, whose own warnings do not count."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "torch is not installed in this Python; run with the project's environment"
        )
    return ["-isystem", str(Path(spec.origin).parent / "include")]


def commands(nvcc: str, archs: list[str], out: str) -> list[list[str]]:
    """One compiler command per source file of csrc/cuda."""
    device = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    python = f"-I{sysconfig.get_paths()['include']}"
    host_flags = ["-O1", "-std=c++20", "-fPIC", "-Wall", "-Werror", TARGET, "-DUSE_CUDA", "-Icsrc"]
    host_flags += ["-fvisibility=hidden", *toolkit_includes(nvcc), python, *torch_includes()]
    result = []
    for source in sorted((ROOT / "csrc" / "cuda").iterdir()):
        target = ["-c", str(source), "-o", f"{out}/{source.name}.o"]
        if source.suffix == ".cu":
            flags = ["-O3", "-std=c++20", "-Icsrc", "--Werror", "all-warnings"]
            result.append([nvcc, *flags, *device, *target])
        elif source.suffix == ".cpp":
            result.append([os.environ.get("CXX", "c++"), *host_flags, *target])
    return result


def compile_one(command: list[str]) -> bool:
    """Runs one command; prints its output if it failed."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    source = Path(command[command.index("-c") + 1]).relative_to(ROOT)
    print(f"{'ok    ' if done.returncode == 0 else 'FAILED'} {source}", flush=True)
    if done.returncode != 0:
        print(" ".join(command), done.stdout, done.stderr, sep="\n", flush=True)
    return done.returncode == 0


def main() -> int:
    """Compiles all; the number of failures is the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--archs", default="80,90", help="compute capabilities, e.g. 80,90")
    parser.add_argument("--if-available", action="store_true", help="succeed where nvcc is missing")
    options = parser.parse_args()
    nvcc = find_nvcc()
    if nvcc is None:
        print("no nvcc in CUDA_HOME or on PATH: CUDA sources not compiled")
        return 0 if options.if_available else 1
    with tempfile.TemporaryDirectory() as out, ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(compile_one, commands(nvcc, options.archs.split(","), out)))
    return results.count(False)


if __name__ == "__main__":
    sys.exit(main())
