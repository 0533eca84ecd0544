"""A copy of the package in a temporary folder, whose native modules are built and tested there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("chanprune_ext", "csrc", "tests", "setup.py", "pyproject.toml", "README.md")
# AddressSanitizer and UBSan; vptr checks would need type information of torch's own classes.
SANITIZERS = (
    "-fsanitize=address,undefined",
    "-fno-sanitize=vptr",
    "-fno-sanitize-recover=undefined",
    "-fno-omit-frame-pointer",
    "-O1",
)


def copy_package(folder: Path) -> None:
    """Copies what git knows of, and what it does not ignore, but no compiled module."""
    copy_listed(folder, "--cached", "--others", "--exclude-standard", *COPIED)


def copy_listed(folder: Path, *arguments: str) -> None:
    """Copies the files that ``git ls-files`` lists, called with these arguments."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", *arguments], cwd=ROOT, capture_output=True, check=True
    )
    for name in filter(None, listing.stdout.decode().split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)


def compiler() -> str:
    """The C++ compiler's command."""
    return os.environ.get("CXX", "c++")


def sanitizer_environment() -> dict[str, str]:
    """Variables for running Python with modules built with ``SANITIZERS``.

    The sanitizer's runtime must be loaded before Python, and with it the C++ library whose
    exceptions it watches.
    """
    files = [
        subprocess.run(
            [compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    return {
        "LD_PRELOAD": " ".join(files),
        "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter and torch have their own
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def run_pytest(folder: Path, arguments: list[str], environment: dict[str, str]) -> int:
    """Runs the tests of a copy on its own modules; returns pytest's exit status."""
    variables = {**os.environ, **environment}
    check = f"from chanprune_ext import _C; assert _C.__file__.startswith({str(folder)!r}), _C"
    subprocess.run([sys.executable, "-c", check], cwd=folder, env=variables, check=True)
    command = [sys.executable, "-m", "pytest", "-m", "not slow", *arguments]
    return subprocess.run(command, cwd=folder, env=variables, check=False).returncode
