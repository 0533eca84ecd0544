"""Builds the wheel once and runs the operator tests with it under several releases of torch.

The tensor modules use LibTorch's stable ABI, so that one build serves every torch from 2.11 on:
here is the proof. Each release gets an environment of its own. Before that the wheel is audited:
which symbols its modules give away and need, and which libraries. Usage::

    python tools/wheel_test.py [--torch 2.11.0 latest] [--keep FOLDER]

Needs the environment that `make install` made (the wheel is built with its torch) and a package
index. A release the index does not have for this Python is an error, unless written with a trailing
question mark ("2.11.0?"): then it is only reported. Exit status 0: audit and all tests passed.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

from package_copy import ROOT, copy_listed

SOURCES = ("csrc", "chanprune_ext", "setup.py", "pyproject.toml", "README.md", "LICENSE")
TEST_PACKAGES = ("pytest", "pytest-timeout", "hypothesis", "expecttest")

# Libraries that are on every Linux machine or come with torch.
LIBRARIES = re.compile(
    r"^(libc10|libtorch|libtorch_cpu|libc10_cuda|libtorch_cuda|libcudart|libstdc\+\+|libm|libgcc_s|"
    r"libc|libpthread|libdl|librt|ld-linux[\w-]*)\.so"
)
# Names of torch's C++ interface, which changes from release to release; the stable one is C.
UNSTABLE = re.compile(r"^_ZN?K?(2at|3c10|5torch|4caffe2)")


def run(command: list[str | Path], **options: object) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run(  # type: ignore[call-overload]
        [str(part) for part in command], capture_output=True, text=True, check=False, **options
    )
    if done.returncode != 0:
        shown = " ".join(map(str, command))
        raise SystemExit(f"failed: {shown}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    return str(done.stdout)


def build_wheel(folder: Path) -> Path:
    """The wheel of a clean copy of the tracked sources."""
    copy = folder / "source"
    copy_listed(copy, *SOURCES)
    out = folder / "wheel"
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    run([*command, "-w", out, copy], cwd=folder)
    (wheel,) = out.glob("*.whl")
    return wheel


def symbols(module: Path, kind: str) -> list[str]:
    """Dynamic symbols of a module: "defined" or "undefined", without their versions."""
    listing = run(["nm", "-D", f"--{kind}-only", module])
    return [line.split()[-1].split("@")[0] for line in listing.splitlines() if line.strip()]


def audit_module(module: Path) -> list[str]:
    """What is wrong with one extension module."""
    problems = []
    name = module.name.split(".")[0]
    given = [s for s in symbols(module, "defined") if s != f"PyInit_{name}"]
    # Inline variables and functions of headers are shared on purpose, by name (vague linkage).
    strange = [s for s in given if not re.match(r"^_Z|^__odr_asan|^_edata|^_end|^__bss_start", s)]
    ours = [s for s in given if re.match(r"_ZN?K?9chanprune", s)]
    if strange or ours:
        problems.append(f"gives away {', '.join((strange + ours)[:8])}")
    needed = symbols(module, "undefined")
    if module.name.endswith(".abi3.so"):
        unstable = [s for s in needed if UNSTABLE.match(s)]
        private = [s for s in needed if s.startswith("_Py") and s != "_Py_NoneStruct"]
        if unstable:
            problems.append(f"needs torch's unstable C++ interface: {', '.join(unstable[:8])}")
        if private:
            problems.append(f"needs names outside Python's stable ABI: {', '.join(private)}")
    dynamic = run(["readelf", "-d", module])
    problems += [
        f"needs the library {library}"
        for library in re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
        if not LIBRARIES.match(library)
    ]
    if re.search(r"\((RPATH|RUNPATH)\)", dynamic):
        problems.append("has a search path of the machine that built it")
    return problems


def audit(wheel: Path, folder: Path) -> int:
    """Prints the findings for every module of the wheel; their number."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    modules = sorted(folder.rglob("*.so"))
    count = 0
    for module in modules:
        problems = audit_module(module)
        count += len(problems)
        print(f"{module.name}: {'; '.join(problems) or 'clean'}", flush=True)
    if not any(module.name == "_C.abi3.so" for module in modules):
        print("the wheel has no _C.abi3.so")
        count += 1
    return count


def test_under(release: str, wheel: Path, folder: Path) -> bool:
    """Runs the operator tests of the installed wheel under one release of torch."""
    release, optional = release.rstrip("?"), release.endswith("?")
    environment = folder / f"torch-{release}"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    torch = "torch" if release == "latest" else f"torch=={release}"
    # Together, so that the resolver finds the torchvision that goes with this torch.
    command = [python, "-m", "pip", "install", "-q", torch, *TEST_PACKAGES, wheel]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        missing = "No matching distribution found for torch" in done.stderr
        print(f"torch {release}: {'not on the index' if missing else 'not installed'}", flush=True)
        print(done.stderr[-2000:] if not missing else "", end="", flush=True)
        return optional and missing
    tests = environment / "tests"
    run(["cp", "-r", ROOT / "tests" / "ops", tests])
    run(["cp", ROOT / "tests" / "conftest.py", tests / "root_conftest.py"])
    merged = (tests / "root_conftest.py").read_text() + "\n\nfrom ops_conftest import *  # noqa\n"
    (tests / "conftest.py").rename(tests / "ops_conftest.py")
    (tests / "conftest.py").write_text(merged)
    where = "import chanprune_ext, torch; print(torch.__version__, chanprune_ext.__file__)"
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    print(run([python, "-c", where], cwd=tests, env=clean).strip(), flush=True)
    options = ["-q", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(tests), "-m", "not slow"]
    done = subprocess.run(
        [python, "-m", "pytest", *options, "-p", "no:cacheprovider", tests],
        capture_output=True,
        text=True,
        check=False,
        cwd=tests,
        env=clean,
    )
    print(f"torch {release}: {done.stdout.strip().splitlines()[-1]}", flush=True)
    if done.returncode != 0:
        print(done.stdout[-6000:], flush=True)
    return done.returncode == 0


def main() -> int:
    """Builds, audits, tests; the number of failures is the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--torch", nargs="+", default=["2.11.0?", "2.12.0?", "latest"])
    parser.add_argument("--keep", type=Path, help="work here and leave everything")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.keep or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        wheel = build_wheel(folder)
        print(f"{wheel.name}, {wheel.stat().st_size / 1e6:.1f} MB", flush=True)
        failures = audit(wheel, folder / "unpacked")
        failures += sum(not test_under(release, wheel, folder) for release in options.torch)
    print("failed" if failures else "all passed")
    return failures


if __name__ == "__main__":
    sys.exit(main())
