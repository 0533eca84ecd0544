"""The end of a network alone, and ends of several blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from block_networks import images, output_error, pair
from torch import Tensor, nn

from chanprune_ext import reconstruct
from chanprune_ext.errors import InvalidArgumentError

if TYPE_CHECKING:
    from chanprune_ext.reconstruction import ReconstructionReport

QUICK: dict[str, Any] = {"epochs": 4, "lr": 5e-2, "batch_size": 8, "progress": False}
ENDS = {1: {"blocks.1", "fc"}, 2: {"blocks.0", "blocks.1", "fc"}}
PARTS = ["stem", "blocks.0", "blocks.1", "fc"]


def parameters(model: nn.Module, part: str) -> list[Tensor]:
    return [p.detach().clone() for p in model.get_submodule(part).parameters()]


def tuned_parts(blocks: int) -> tuple[set[str], float, ReconstructionReport]:
    """Parts that changed, the divergence over that before, and the report."""
    pruned, original = pair("residual")
    before = {part: parameters(pruned, part) for part in PARTS}
    unseen = images(48, seed=9)
    start = output_error(pruned, original, unseen)
    report = reconstruct(
        pruned, original, images(64), tune_blocks=False, output_blocks=blocks, **QUICK
    )
    changed = {
        part
        for part in PARTS
        if any(
            not torch.equal(a, b)
            for a, b in zip(before[part], parameters(pruned, part), strict=True)
        )
    }
    return changed, output_error(pruned, original, unseen) / start, report


@pytest.mark.parametrize("blocks", ENDS)
def test_only_the_end_changes_and_the_output_comes_closer(blocks: int) -> None:
    changed, share, report = tuned_parts(blocks)
    assert changed == ENDS[blocks]
    assert share < 0.7
    assert report.kept == "reconstructed"
    assert [block.name for block in report.blocks] == ["output"]


def test_more_blocks_than_there_are_leave_the_stem_as_it_is() -> None:
    changed, share, _ = tuned_parts(100)
    assert changed == ENDS[2]
    assert share < 0.7


def test_blocks_are_tuned_before_a_longer_end() -> None:
    ends = []
    for blocks in (1, 2):
        pruned, original = pair("residual")
        report = reconstruct(pruned, original, images(64), output_blocks=blocks, **QUICK)
        *alone, end = report.blocks
        assert [block.name for block in alone] == ["stem", "blocks.0", "blocks.1"]
        ends.append(end)
    assert ends[1].parameters > ends[0].parameters
    # Both begin with the network as the blocks have left it: no other would be as far off.
    assert ends[1].error_before == pytest.approx(ends[0].error_before, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"tune_blocks": False, "tune_outputs": False}, "tune_blocks, tune_outputs"),
        ({"output_blocks": 0}, "output_blocks"),
        ({"output_blocks": 1.5}, "output_blocks"),
    ],
)
def test_a_reconstruction_of_nothing_is_refused(options: dict[str, Any], named: str) -> None:
    pruned, original = pair("residual")
    with pytest.raises(InvalidArgumentError, match=f"^{named}:"):
        reconstruct(pruned, original, images(8), **options)
