"""Reconstruction on small networks: it improves, it is never worse, it leaves nothing behind."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import toys  # noqa: F401 - registers the toys
from block_networks import NETWORKS, Classifier, Residual, images, output_error, pair
from models import randomised
from torch import Tensor, nn
from toy_registry import TOYS

import chanprune_ext
from chanprune_ext import reconstruct
from chanprune_ext.errors import InvalidArgumentError

QUICK: dict[str, Any] = {"epochs": 3, "lr": 1e-2, "batch_size": 8, "progress": False}


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(before[name], t) for name, t in model.state_dict().items())


@torch.no_grad()
def block_errors(
    pruned: nn.Module, original: nn.Module, names: list[str], inputs: Tensor
) -> list[float]:
    """Relative squared errors at the outputs of modules, by hooks of their own."""
    seen: list[dict[str, Tensor]] = []
    for model in (pruned, original):
        found: dict[str, Tensor] = {}
        handles = [
            model.get_submodule(name).register_forward_hook(
                lambda _, __, out, name=name, found=found: found.update({name: out.clone()})
            )
            for name in names
        ]
        model(inputs)
        for handle in handles:
            handle.remove()
        seen.append(found)
    return [
        float((seen[0][n] - seen[1][n]).square().sum() / seen[1][n].square().sum()) for n in names
    ]


BLOCKS = {
    "residual": ["blocks.0", "blocks.1"],
    "bottleneck": ["blocks.0", "blocks.1"],
    "inverted": ["blocks.0", "blocks.1"],
    "transformer": ["layers.0", "layers.1"],
}


@pytest.mark.parametrize("name", NETWORKS)
def test_unseen_inputs_come_out_closer_to_the_original(name: str) -> None:
    pruned, original = pair(name)
    before, weights = output_error(pruned, original, images(32, seed=9)), state(original)
    report = reconstruct(pruned, original, images(64), **QUICK)
    assert report.kept == "reconstructed"
    assert output_error(pruned, original, images(32, seed=9)) < 0.7 * before
    assert same(original, weights)
    assert report.after.better_than(report.before)


@pytest.mark.parametrize("name", BLOCKS)
def test_every_block_improves_on_unseen_inputs(name: str) -> None:
    pruned, original = pair(name)
    unseen = images(32, seed=9)
    before = block_errors(pruned, original, BLOCKS[name], unseen)
    report = reconstruct(pruned, original, images(64), tune_outputs=False, **QUICK)
    after = block_errors(pruned, original, BLOCKS[name], unseen)
    assert all(a < 0.8 * b for a, b in zip(after, before, strict=True))
    tuned = {block.name: block for block in report.blocks if block.left is None}
    for block in BLOCKS[name]:
        assert tuned[block].error_after < tuned[block].error_before
        assert tuned[block].epoch >= 1
        assert tuned[block].parameters > 0


def test_reported_errors_are_those_of_the_networks() -> None:
    pruned, original = pair("residual")
    inputs = images(48)
    report = reconstruct(pruned, original, inputs, held_back=0, tune_outputs=False, **QUICK)
    # Nothing held back: all samples judge. The last block's error is measured on the final network.
    (expected,) = block_errors(pruned, original, ["blocks.1"], inputs)
    (block,) = [b for b in report.blocks if b.name == "blocks.1"]
    assert block.error_after == pytest.approx(expected, rel=1e-4)


def test_steps_too_large_change_nothing_for_the_worse() -> None:
    pruned, original = pair("inverted")
    unseen = images(48, seed=9)
    before, weights = output_error(pruned, original, unseen), state(pruned)
    report = reconstruct(pruned, original, images(64), **{**QUICK, "lr": 0.99})
    for block in report.blocks:
        if block.error_before is not None:
            assert block.error_after <= block.error_before
    better = report.after.better_than(report.before)
    assert report.kept == ("reconstructed" if better else "before")
    assert better or same(pruned, weights)
    assert output_error(pruned, original, unseen) <= 1.5 * before


def test_an_unpruned_network_has_nothing_to_gain() -> None:
    pruned, _ = pair("residual")
    plan = chanprune_ext.plan_of(pruned)
    twin = copy.deepcopy(pruned)
    weights = state(pruned)

    shapes = {name: list(tensor.shape) for name, tensor in twin.state_dict().items()}
    nothing = SimpleNamespace(kept={}, groups=plan.groups, fingerprint={"tensors": shapes})
    report = reconstruct(pruned, twin, images(24), plan=nothing, **QUICK)
    assert report.kept == "before"
    assert same(pruned, weights)
    assert all(b.left == "it has no error" for b in report.blocks if b.name.startswith("blocks"))


def test_same_seed_same_weights() -> None:
    results = []
    for seed in (3, 3, 4):
        pruned, original = pair("residual")
        torch.manual_seed(seed * 7)  # the global state must not matter
        reconstruct(pruned, original, images(40), seed=seed, **QUICK)
        results.append(state(pruned))
    assert all(torch.equal(results[0][k], results[1][k]) for k in results[0])
    assert not all(torch.equal(results[0][k], results[2][k]) for k in results[0])


def test_flags_gradients_and_random_state_stay() -> None:
    pruned, original = pair("residual")
    pruned.train()
    pruned.blocks[1].eval()
    frozen = pruned.blocks[0].conv1.weight.requires_grad_(False)
    values = frozen.clone()
    gradient = torch.ones_like(pruned.fc.weight)
    pruned.fc.weight.grad = gradient
    modes = [m.training for m in pruned.modules()]
    statistics = {n: b.clone() for n, b in pruned.named_buffers()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in pruned.modules()]
    random = torch.get_rng_state()
    flipping = {"augment": lambda x: x.flip(3) if torch.rand(()) < 0.5 else x, "views": 1}
    reconstruct(pruned, original, images(40), **flipping, **QUICK)
    assert torch.equal(random, torch.get_rng_state())
    assert modes == [m.training for m in pruned.modules()]
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in pruned.modules()]
    assert torch.equal(frozen, values)
    assert not frozen.requires_grad
    assert pruned.blocks[0].conv2.weight.requires_grad
    assert pruned.fc.weight.grad is gradient
    assert bool((gradient == 1).all())
    assert pruned.blocks[0].conv2.weight.grad is None
    assert all(torch.equal(statistics[n], b) for n, b in pruned.named_buffers())
    assert torch.backends.mha.get_fastpath_enabled()


class Fragile(Residual):
    """Raises, or returns NaN, as soon as gradients are wanted."""

    failure = ""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and self.failure == "raise":
            raise ValueError("out of order")
        y = super().forward(x)
        return y * float("nan") if torch.is_grad_enabled() and self.failure == "nan" else y


def fragile(failure: str) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = randomised(
        Classifier(nn.Sequential(Residual(8, 12), Fragile(8, 12), Residual(8, 12)), 8)
    )
    plan = chanprune_ext.plan(model, images(2), ratio=0, ratios={"blocks.*.conv1": 0.5})
    pruned = plan.apply(model)
    pruned.blocks[1].failure = failure
    return pruned, model


@pytest.mark.parametrize(("failure", "reason"), [("raise", "out of order"), ("nan", "not finite")])
def test_a_block_that_fails_is_named_and_left_alone(failure: str, reason: str) -> None:
    pruned, original = fragile(failure)
    before = state(pruned)
    report = reconstruct(pruned, original, images(40), tune_outputs=False, **QUICK)
    blocks = {block.name: block for block in report.blocks}
    assert reason in blocks["blocks.1"].left
    assert [blocks[f"blocks.{i}"].left for i in (0, 2)] == [None, None]
    changed = {n for n, t in pruned.state_dict().items() if not torch.equal(before[n], t)}
    assert {n.split(".")[1] for n in changed if n.startswith("blocks")} == {"0", "2"}


def test_an_error_in_the_middle_undoes_everything() -> None:
    pruned, original = pair("residual")
    before = state(pruned)
    calls = 0

    def fail_late(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if torch.equal(pruned.blocks[0].conv2.weight, before["blocks.0.conv2.weight"]):
            return  # until the first block has been changed
        raise KeyboardInterrupt

    handle = pruned.blocks[1].register_forward_hook(fail_late)
    with pytest.raises(KeyboardInterrupt):
        reconstruct(pruned, original, images(40), **QUICK)
    handle.remove()
    assert calls > 0
    assert same(pruned, before)
    assert not pruned.training


def test_shared_parameters_keep_their_values_and_stay_shared() -> None:
    torch.manual_seed(0)
    model = randomised(Classifier(nn.Sequential(Residual(8, 12), Residual(8, 12)), 8))
    model.blocks[1].bn2 = model.blocks[0].bn2
    plan = chanprune_ext.plan(model, images(2), ratio=0, ratios={"blocks.*.conv1": 0.5})
    pruned = plan.apply(model)
    shared = pruned.blocks[0].bn2.weight
    values = shared.clone()
    report = reconstruct(pruned, model, images(40), **QUICK)
    assert report.kept == "reconstructed"
    assert pruned.blocks[1].bn2.weight is shared
    assert torch.equal(shared, values)


@pytest.mark.parametrize("name", ["Decoder", "TiedParameter"])
def test_tied_weights_of_the_toys(name: str) -> None:
    toy = TOYS[name]
    torch.manual_seed(0)
    model = randomised(toy.make())
    batches = [toy.inputs() for _ in range(4)]
    pruned = chanprune_ext.plan(model, batches[0], ratio=0.5).apply(model)
    parameters = [id(p) for _, p in pruned.named_parameters(remove_duplicate=False)]
    assert len(set(parameters)) < len(parameters)
    report = reconstruct(pruned, model, batches, held_back=0.25, epochs=1, progress=False)
    assert report.after.better_than(report.before)
    assert parameters == [id(p) for _, p in pruned.named_parameters(remove_duplicate=False)]


def test_half_precision_networks_are_tuned_in_single_precision() -> None:
    pruned, original = pair("residual")
    pruned, original = pruned.bfloat16(), original.bfloat16()
    unseen = images(32, seed=9).bfloat16()
    before = output_error(pruned, original, unseen)
    report = reconstruct(pruned, original, images(64).bfloat16(), **QUICK)
    assert report.kept == "reconstructed"
    assert {p.dtype for p in pruned.parameters()} == {torch.bfloat16}
    assert output_error(pruned, original, unseen) < 0.8 * before


def test_autocast_sees_every_step() -> None:
    unseen = images(32, seed=9)
    errors = []
    for amp in (None, torch.bfloat16):
        pruned, original = pair("inverted")
        reconstruct(pruned, original, images(64), amp=amp, **{**QUICK, "epochs": 12})
        errors.append(output_error(pruned, original, unseen))
    assert errors[1] < 1.5 * errors[0]


def test_autocast_for_the_gradients() -> None:
    pruned, original = pair("inverted")
    before = output_error(pruned, original, images(32, seed=9))
    report = reconstruct(pruned, original, images(64), amp=torch.bfloat16, **QUICK)
    assert report.kept == "reconstructed"
    assert output_error(pruned, original, images(32, seed=9)) < 0.8 * before
    assert {p.dtype for p in pruned.parameters()} == {torch.float32}


def test_gradients_in_float16_do_not_vanish() -> None:
    """Large outputs with many pixels: each element's share of the loss is below float16's least."""
    pruned, original = pair("bottleneck")
    report = reconstruct(
        pruned,
        original,
        1000 * images(48, side=64),
        epochs=3,
        lr=5e-2,
        batch_size=16,
        amp=torch.float16,
        tune_outputs=False,
        progress=False,
    )
    for block in report.blocks:
        if block.name.startswith("blocks"):
            assert block.error_after < 0.75 * block.error_before


def test_channels_removed_from_the_residual_stream() -> None:
    """The original's outputs are compared on the channels that are left."""
    torch.manual_seed(0)
    model = randomised(Classifier(nn.Sequential(Residual(8, 8), Residual(8, 8)), 8))
    plan = chanprune_ext.plan(model, images(2), ratio=0.5)
    pruned = plan.apply(model)
    unseen = images(32, seed=9)
    kept = plan.kept["blocks.0.bn2.weight"][0]
    assert len(kept) == 4

    @torch.no_grad()
    def error() -> float:
        ours = pruned.blocks(torch.relu(pruned.stem(unseen)))
        theirs = model.blocks(torch.relu(model.stem(unseen)))[:, kept]
        return float((ours - theirs).square().sum() / theirs.square().sum())

    before = error()
    report = reconstruct(pruned, model, images(64), tune_outputs=False, **QUICK)
    assert all(block.left is None for block in report.blocks if block.name.startswith("blocks"))
    assert error() < 0.8 * before


def test_inputs_given_as_dicts_and_labels_ignored() -> None:
    pruned, original = pair("residual")
    twin = copy.deepcopy(pruned)
    reconstruct(pruned, original, [(images(40), torch.zeros(40, dtype=torch.long))], **QUICK)
    reconstruct(twin, original, [{"x": images(40)}], **QUICK)
    assert all(
        torch.equal(a, b) for a, b in zip(pruned.parameters(), twin.parameters(), strict=True)
    )


def test_views_of_another_size() -> None:
    pruned, original = pair("residual")
    report = reconstruct(
        pruned, original, images(24), augment=lambda x: x[..., :6, :6], views=1, **QUICK
    )
    assert report.kept == "reconstructed"


def test_an_output_that_is_no_matrix_of_logits() -> None:
    """Tuned by KL divergence, a shift of all columns would be left as it is."""
    pruned, original = pair("residual")
    with torch.no_grad():
        pruned.fc.bias += 1.0
    report = reconstruct(pruned, original, images(64), logits=False, tune_blocks=False, **QUICK)
    assert report.kept == "reconstructed"
    assert report.before.kl is None
    assert report.after.relative_l2 < report.before.relative_l2


def test_the_report_is_json() -> None:
    pruned, original = pair("plain")
    report = reconstruct(pruned, original, images(24), **QUICK)
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert (data["held_back"], data["samples"]) == (2, 22)
    assert [block["name"] for block in data["blocks"]][-1] == "output"
    assert "kept reconstructed" in str(report)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"epochs": 0}, "epochs"),
        ({"lr": 2.0}, "lr"),
        ({"batch_size": 0}, "batch_size"),
        ({"held_back": 1.0}, "held_back"),
        ({"views": 2}, "views"),
        ({"amp": torch.float64}, "amp"),
        ({"memory_limit": 0}, "memory_limit"),
        ({"memory_limit": "1 GB"}, "memory_limit"),
        ({"augment": lambda x: x[..., :0], "views": 1}, "augment"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], named: str) -> None:
    pruned, original = pair("plain")
    before = state(pruned)
    with pytest.raises(InvalidArgumentError, match=f"^{named}:"):
        reconstruct(pruned, original, images(8), **options)
    assert same(pruned, before)
