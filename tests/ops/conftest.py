"""The operator tests compare native kernels with the references, so the kernels must be there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import hypothesis
import pytest
import torch

from chanprune_ext.ops._loader import CPU_MODULE, native_available

if TYPE_CHECKING:
    from collections.abc import Iterator

# Examples reach the kernels through hypothesis; a fixed, printed seed keeps failures repeatable.
hypothesis.settings.register_profile(
    "ops", max_examples=60, deadline=None, derandomize=True, print_blob=True
)
hypothesis.settings.load_profile("ops")


def pytest_runtest_setup() -> None:
    if not CPU_MODULE.loaded:
        pytest.fail(f"{CPU_MODULE.name}: {CPU_MODULE.problem}: these tests would test nothing")


@pytest.fixture(scope="module", autouse=True)
def _two_threads() -> Iterator[None]:
    """Kernels divide their work: on one thread nobody would see how."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(2, before))
    yield
    torch.set_num_threads(before)


@pytest.fixture
def native_device(device: torch.device) -> torch.device:
    """A device whose kernels are built; a GPU without the CUDA module is a failure, not a skip."""
    assert native_available(torch.empty(0, device=device)), f"no native kernels for {device}"
    return device
