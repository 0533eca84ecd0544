"""Builds the CPU modules with AddressSanitizer and UBSan in a copy and runs their tests.

Usage::

    python tools/sanitize.py [pytest arguments]

Exit status: that of pytest, or of the build if it fails.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from package_copy import SANITIZERS, copy_package, run_pytest, sanitizer_environment

TESTED = ("tests/ops", "tests/analysis/test_labels.py")
# One version of every function: the sanitizer's runtime is not ready when clones are chosen.
FLAGS = (*SANITIZERS, "-DCHANPRUNE_NO_CLONES")


def main() -> int:
    """Builds and tests."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_package(folder)
        build = subprocess.run(
            [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
            cwd=folder,
            env={**os.environ, "CHANPRUNE_CXX_FLAGS": " ".join(FLAGS), "FORCE_CUDA": "0"},
            check=False,
        )
        if build.returncode != 0:
            return build.returncode
        environment = {**sanitizer_environment(), "OMP_NUM_THREADS": "2"}
        return run_pytest(folder, [*TESTED, *sys.argv[1:]], environment)


if __name__ == "__main__":
    sys.exit(main())
