"""Samples of blocks: the same whether carried along, kept, or made anew; never over the limit."""

from __future__ import annotations

import pytest
import torch
from block_networks import images, pair
from torch import Tensor, nn

import chanprune_ext
from chanprune_ext import reconstruct
from chanprune_ext.reconstruction.blocks import find_blocks
from chanprune_ext.reconstruction.feed import Feed
from chanprune_ext.reconstruction.passages import entry_order, survey


def feeds(name: str, limit: int, batches: list[Tensor]) -> tuple[Feed, nn.Module, nn.Module, list]:
    pruned, original = pair(name)
    plan = chanprune_ext.plan_of(pruned)
    few = batches[0][:2]
    with torch.no_grad():
        blocks, _ = find_blocks(original, plan.groups, entry_order(original, few))
        surveys = survey(pruned, few, blocks), survey(original, few, blocks)
    return Feed(pruned, original, blocks, surveys, batches, limit), pruned, original, blocks


def hooked(model: nn.Module, path: str, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Input and output of a module, seen by hooks of the test's own."""
    seen = []
    module = model.get_submodule(path)
    handles = [
        module.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone())),
        module.register_forward_hook(lambda _, __, out: seen.append(out.clone())),
    ]
    with torch.no_grad():
        model(inputs)
    for handle in handles:
        handle.remove()
    return seen[0], seen[1]


def entries_of(module: nn.Module) -> list[object]:
    """Grows by one whenever the module is entered."""
    entries: list[object] = []
    module.register_forward_pre_hook(lambda *inputs: entries.append(inputs))
    return entries


@pytest.mark.parametrize("name", ["residual", "bottleneck", "inverted", "transformer"])
@pytest.mark.parametrize("limit", [0, 40_000, 1 << 30])
def test_samples_are_what_goes_in_and_comes_out(name: str, limit: int) -> None:
    batches = list(images(24).split(8))
    feed, pruned, original, blocks = feeds(name, limit, batches)
    for i, block in enumerate(blocks):
        feed.open(i)
        assert feed.bytes <= limit
        if len(block.modules) == 1:
            for j, batch in enumerate(batches):
                given, _ = hooked(pruned, block.modules[0], batch)
                _, expected = hooked(original, block.modules[0], batch)
                torch.testing.assert_close(feed.inputs(j).tensors[0], given)
                torch.testing.assert_close(feed[j].target, expected)
        with torch.no_grad():  # as tuning would
            for path in block.modules:
                for parameter in pruned.get_submodule(path).parameters():
                    parameter.mul_(1.01)


def test_what_follows_directly_is_not_computed_from_the_beginning() -> None:
    batches = list(images(16).split(8))
    feed, pruned, _, blocks = feeds("residual", 1 << 30, batches)
    entries = entries_of(pruned.stem)
    for i in range(3):  # stem, then the first block behind a bare ReLU, then the second
        feed.open(i)
    assert [b.name for b in blocks[:3]] == ["stem", "blocks.0", "blocks.1"]
    # For the first block, once a batch; what comes before the stem has no stem.
    assert len(entries) == 2
    assert feed.share_kept == 1


def test_the_original_does_not_run_where_no_targets_are_wanted() -> None:
    batches = list(images(16).split(8))
    feed, pruned, original, blocks = feeds("residual", 1 << 30, batches)
    entries = entries_of(original.stem)
    feed.open(1, targets=False)
    assert not entries
    given, _ = hooked(pruned, blocks[1].modules[0], batches[1])
    torch.testing.assert_close(feed.inputs(1).tensors[0], given)
    feed.open(2)  # follows, but there are no targets to carry on from
    _, expected = hooked(original, blocks[2].modules[0], batches[1])
    torch.testing.assert_close(feed[1].target, expected)


def test_a_small_limit_changes_the_time_and_not_the_result() -> None:
    results = []
    for limit in (None, 60_000, 1):
        pruned, original = pair("residual")
        report = reconstruct(
            pruned,
            original,
            images(40),
            epochs=2,
            batch_size=8,
            memory_limit=limit,
            tune_outputs=False,
            progress=False,
        )
        results.append((pruned.state_dict(), [b.kept_in_memory for b in report.blocks]))
    assert all(share == 1 for share in results[0][1])
    assert any(0 < share < 1 for share in results[1][1])
    assert all(share == 0 for share in results[2][1])
    for other, _ in results[1:]:
        for name, tensor in results[0][0].items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-5)


def test_no_room_for_the_outputs() -> None:
    pruned, original = pair("residual")
    report = reconstruct(pruned, original, images(24), epochs=1, memory_limit=1, progress=False)
    (end,) = [block for block in report.blocks if block.name == "output"]
    assert "bytes" in end.left
