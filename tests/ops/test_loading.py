"""The package without its compiled modules: switched off, missing, or broken."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import chanprune_ext
from chanprune_ext.ops import build_info

PACKAGE = Path(chanprune_ext.__file__).parent

# Run in a fresh interpreter: uses all three operators, prints warnings and what served the calls.
SCRIPT = """
import json, sys, types, warnings
from pathlib import Path

# The package without its __init__, which imports rooms that have nothing to do with the operators.
package = types.ModuleType("chanprune_ext")
package.__path__ = [sys.argv[1]]
sys.modules["chanprune_ext"] = package
# An editable install would find the compiled modules of the source tree all the same.
sys.meta_path = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", "")]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    from chanprune_ext.errors import InvalidArgumentError
    from chanprune_ext.ops import build_info, channel_norms, kd_kl_div, slice_channels

weight = torch.arange(6.0).reshape(2, 3).requires_grad_()
norms = channel_norms([weight], [1])[0]
norms.sum().backward()
sliced = slice_channels([weight], [None], [torch.tensor([2, 0])])[0]
loss = kd_kl_div(weight, torch.zeros(2, 3), labels=torch.tensor([0, 1]), hard_weight=1.0)
refused = []
for call in (
    lambda: slice_channels([weight], [torch.tensor([2])], [None]),
    lambda: kd_kl_div(weight, weight.detach(), labels=torch.tensor([0, 3]), hard_weight=1.0),
):
    try:
        call()
    except InvalidArgumentError as error:
        refused.append(str(error))
info = build_info()
print(json.dumps({
    "warnings": [str(w.message) for w in caught if "chanprune" in str(w.message)],
    "norms": norms.tolist(), "grad": weight.grad.tolist(), "sliced": sliced.tolist(),
    "loss": loss.item(), "refused": refused, "cpu": info["cpu"], "modules": info["modules"],
    "simd_level": info["simd_level"],
}))
"""


def run(package: Path, **environment: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(package)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def copy_without_modules(target: Path) -> Path:
    return Path(
        shutil.copytree(
            PACKAGE, target / "chanprune_ext", ignore=shutil.ignore_patterns("*.so", "__pycache__")
        )
    )


@pytest.fixture(scope="module")
def native() -> dict:
    return run(PACKAGE)


def assert_same_results(found: dict, native: dict) -> None:
    assert native["cpu"]
    assert not found["cpu"]
    for key in ("norms", "grad", "sliced", "refused"):
        assert found[key] == native[key]
    assert found["loss"] == pytest.approx(native["loss"], rel=1e-6)


def test_switched_off(native):
    found = run(PACKAGE, CHANPRUNE_DISABLE_NATIVE="1")
    assert_same_results(found, native)
    assert found["warnings"] == []
    assert "CHANPRUNE_DISABLE_NATIVE" in found["modules"]["chanprune_ext._C"]


def test_not_built(tmp_path, native):
    found = run(copy_without_modules(tmp_path))
    assert_same_results(found, native)
    (warning,) = found["warnings"]
    assert "chanprune_ext._C is not in use: not built" in warning
    assert "pip install --no-build-isolation -e ." in warning
    assert found["simd_level"] is None


def test_broken_file(tmp_path, native):
    package = copy_without_modules(tmp_path)
    (package / "_C.abi3.so").write_bytes(b"not a library")
    found = run(package)
    assert_same_results(found, native)
    (warning,) = found["warnings"]
    assert "chanprune_ext._C is not in use: cannot be loaded" in warning
    assert "pip install --no-build-isolation -e ." in warning


def test_built_modules_are_described(native):
    info = build_info()
    assert native["warnings"] == []
    assert info["cpu"]
    assert info["simd_level"] in ("default", "x86-64-v3", "x86-64-v4")
    assert info["target_torch"] == "2.11"
    assert info["modules"]["chanprune_ext._C"].endswith(".abi3.so")
    assert info["modules"]["chanprune_ext._coupling"].endswith(".so")
    json.dumps(info)
