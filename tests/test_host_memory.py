"""Freed memory that stays with the process for a while."""

from __future__ import annotations

import resource
from typing import Any

import pytest
import torch

from chanprune_ext import host_memory
from chanprune_ext.host_memory import freed_memory_kept

PAGES = (64 << 20) // resource.getpagesize()


def faults_of_blocks(count: int) -> int:
    """Page faults while large blocks are filled and freed, one after the other."""
    torch.ones(16 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        torch.ones(16 << 20)  # 64 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_blocks_are_used_again() -> None:
    with freed_memory_kept():
        assert faults_of_blocks(10) < 3 * PAGES


class Library:
    """Stands in for the C library."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def mallopt(self, parameter: int, value: int) -> None:
        self.calls.append((parameter, value))

    def malloc_trim(self, _: int) -> None:
        self.calls.append("trim")


def test_only_the_outermost_block_gives_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library()
    monkeypatch.setattr(host_memory, "_glibc", lambda: library)

    def nested() -> None:
        with freed_memory_kept():
            with freed_memory_kept():
                kept.extend(library.calls)
            assert library.calls == kept
            raise ZeroDivisionError

    kept: list[Any] = []
    with pytest.raises(ZeroDivisionError):
        nested()
    assert library.calls[-1] == "trim"
    assert {parameter for parameter, _ in kept} == {-1, -4, -8}
    assert dict(library.calls[len(kept) : -1]) == {
        -1: 64 << 20,
        -3: 32 << 20,
        -4: 65536,
        -8: 0,
    }


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "_glibc", lambda: None)
    with freed_memory_kept():
        pass
