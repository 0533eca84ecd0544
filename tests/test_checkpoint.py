"""Saving, loading, and every way in which a file can be wrong."""

from __future__ import annotations

import argparse
import copy
import json
import os
import resource
import signal
import stat
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import chanprune_ext as cpx
from chanprune_ext import checkpoint
from chanprune_ext.atomic_files import check_writable, write_atomically, write_text
from chanprune_ext.checkpoint import load, load_weights, save
from chanprune_ext.errors import CheckpointError, InvalidArgumentError, OutputError
from chanprune_ext.models import CifarResNet

if TYPE_CHECKING:
    from collections.abc import Callable


def small_net(seed: int = 0) -> CifarResNet:
    torch.manual_seed(seed)
    return CifarResNet(8, width=4)


def assert_same_state(left: nn.Module, right: nn.Module) -> None:
    a, b = left.state_dict(), right.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(x))


def test_round_trip_of_an_unpruned_model_is_bit_exact(tmp_path: Path) -> None:
    model, other = small_net(0), small_net(1)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    save(model, tmp_path / "a.safetensors")
    loaded = load(tmp_path / "a.safetensors", other)
    assert_same_state(model, loaded)
    assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())


def test_round_trip_of_a_pruned_model_rebuilds_the_narrow_one(tmp_path: Path) -> None:
    model = small_net().eval()
    x = torch.randn(2, 3, 32, 32)
    pruned = cpx.prune(model, x, ratio=0.5)
    assert pruned.conv1.out_channels < model.conv1.out_channels
    with torch.no_grad():
        pruned.linear.bias.add_(1)  # weights of its own, not those that slicing would give
    save(pruned, tmp_path / "a.safetensors")
    loaded = load(tmp_path / "a.safetensors", small_net(1).eval())
    assert_same_state(pruned, loaded)
    assert torch.equal(pruned(x), loaded(x))
    again = cpx.plan_of(loaded)
    assert again is not None
    assert again.to_dict()["kept"] == cpx.plan_of(pruned).to_dict()["kept"]
    assert (tmp_path / "a.safetensors").stat().st_size < 4 * sum(
        value.numel() for value in model.state_dict().values()
    ) + len(json.dumps(again.to_dict())) + 20_000


def test_dtypes_and_layouts_of_the_saved_model_win(tmp_path: Path) -> None:
    model = small_net().to(torch.bfloat16).to(memory_format=torch.channels_last)
    save(model, tmp_path / "a.safetensors")
    assert_same_state(model, load(tmp_path / "a.safetensors", small_net(1)))


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    model = Tied()
    save(model, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert list(file.keys()) == ["embed.weight"]
    loaded = load(tmp_path / "a.safetensors", Tied())
    assert loaded.head.weight is loaded.embed.weight
    assert torch.equal(loaded.head.weight, model.head.weight)
    assert_same_state(load_weights(Tied(), tmp_path / "a.safetensors"), model)


def test_overlapping_views_are_stored_apart(tmp_path: Path) -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            table = torch.arange(12.0)
            self.register_buffer("whole", table)
            self.register_buffer("part", table[3:6])

    save(Views(), tmp_path / "a.safetensors")
    assert_same_state(load(tmp_path / "a.safetensors", Views()), Views())


def test_other_views_of_a_stored_tensor_are_stored_apart(tmp_path: Path) -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4, bias=False)
            self.register_buffer("flat", self.layer.weight.data.view(-1))

    model = Flat()
    save(model, tmp_path / "a.safetensors")
    assert_same_state(load(tmp_path / "a.safetensors", Flat()), model)


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_of_a_wrapped_model_the_one_inside_is_saved(
    tmp_path: Path, wrap: Callable[[nn.Module], nn.Module]
) -> None:
    pruned = cpx.prune(small_net(), torch.zeros(1, 3, 32, 32), ratio=0.5)
    save(wrap(pruned), tmp_path / "a.safetensors")
    assert_same_state(load(tmp_path / "a.safetensors", small_net(1)), pruned)


class Counting(nn.Linear):
    """Keeps a number beside its weights."""

    calls = 0

    def get_extra_state(self) -> torch.Tensor:
        return torch.tensor([self.calls])

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.calls = int(state[0])


def test_extra_state_reaches_the_module(tmp_path: Path) -> None:
    model = nn.Sequential(Counting(2, 2))
    model[0].calls = 7
    save(model, tmp_path / "a.safetensors")
    assert load(tmp_path / "a.safetensors", nn.Sequential(Counting(2, 2)))[0].calls == 7
    torch.save(model.state_dict(), tmp_path / "a.pt")
    assert load_weights(nn.Sequential(Counting(2, 2)), tmp_path / "a.pt")[0].calls == 7


def test_a_model_on_the_meta_device_can_not_hold_weights(tmp_path: Path) -> None:
    save(small_net(), tmp_path / "a.safetensors")
    with torch.device("meta"):
        empty = CifarResNet(8, width=4)
    for read in (load, lambda path, model: load_weights(model, path)):
        with pytest.raises(InvalidArgumentError, match="on the meta device, which holds no values"):
            read(tmp_path / "a.safetensors", empty)


def test_links_stay_and_what_they_lead_to_is_written(tmp_path: Path) -> None:
    target, link = tmp_path / "elsewhere" / "a.safetensors", tmp_path / "latest.safetensors"
    target.parent.mkdir()
    link.symlink_to(target)
    for _ in range(2):
        save(small_net(), link)
        assert link.is_symlink()
        assert_same_state(load(target, small_net(1)), small_net())
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        *("a.safetensors", "elsewhere", "latest.safetensors")
    ]


def test_a_pipe_is_written_to_and_stays(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_text(pipe, "hello")
        assert os.read(reader, 100) == b"hello"
    finally:
        os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="it is a folder"):
        check_writable(tmp_path / "folder")
    check_writable(tmp_path / "new" / "a.json")
    assert list((tmp_path / "new").iterdir()) == []


def test_an_existing_file_is_replaced_with_ordinary_permissions(tmp_path: Path) -> None:
    target, plain = tmp_path / "a.safetensors", tmp_path / "plain"
    target.write_text("old")
    plain.touch()
    save(small_net(), target)
    assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.safetensors", "plain"]
    load(target, small_net(1))


@pytest.mark.parametrize("step", ["save_file", "fsync", "replace"])
def test_a_failure_while_writing_leaves_the_old_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    target = tmp_path / "a.safetensors"
    target.write_text("old")

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    place = {"save_file": checkpoint, "fsync": os, "replace": Path}[step]
    monkeypatch.setattr(place, step, fail)
    with pytest.raises(OutputError, match=r"a\.safetensors: can't be written .*No space left"):
        save(small_net(), target)
    assert target.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_an_interrupt_while_writing_leaves_no_file(tmp_path: Path) -> None:
    def interrupted(file: Path) -> None:
        file.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "a", interrupted)
    assert list(tmp_path.iterdir()) == []


def test_a_really_full_disk_leaves_no_file(tmp_path: Path) -> None:
    """The operating system refuses to let a file grow beyond 4 kB, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OutputError, match="has room"):
            save(small_net(), tmp_path / "a.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


def test_unwritable_places_are_named(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no/such/folder/a: can't be written"):
        save(small_net(), tmp_path / "no/such/folder/a")
    with pytest.raises(OutputError, match="it is a folder"):
        save(small_net(), tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="can't be written"):
        save(small_net(), tmp_path / "file" / "a")


def test_state_that_is_no_tensor_is_refused(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"calls": 3}

    with pytest.raises(InvalidArgumentError, match=r"'_extra_state' is a dict"):
        save(Extra(2, 2), tmp_path / "a")
    with pytest.raises(InvalidArgumentError, match=r"'weight' is a meta"):
        save(nn.Linear(2, 2, device="meta"), tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("keep", [0, 7, 300, -1])
def test_truncated_files_are_recognised(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "a.safetensors"
    save(small_net(), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"a\.safetensors: can't be read"):
        load(path, small_net())
    with pytest.raises(CheckpointError, match=r"a\.safetensors: can't be read"):
        load_weights(small_net(), path)


def test_missing_and_foreign_files_are_recognised(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="can't be read"):
        load(tmp_path / "none.safetensors", small_net())
    save_file(small_net().state_dict(), tmp_path / "foreign.safetensors")
    with pytest.raises(CheckpointError, match=r"not written by chanprune_ext\.save"):
        load(tmp_path / "foreign.safetensors", small_net())


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format": "chanprune", "version": "99"}, "format version 99, this release reads 2"),
        ({"format": "chanprune", "version": "2", "plans": "["}, "description is damaged"),
        ({"format": "chanprune", "version": "2", "plans": "[{}]"}, "description is damaged"),
        (
            {"format": "chanprune", "version": "2", "aliases": '{"a": "b"}'},
            "description is damaged",
        ),
        ({"format": "chanprune", "version": "2", "aliases": "[]"}, "description is damaged"),
    ],
)
def test_damaged_descriptions_are_recognised(
    tmp_path: Path, metadata: dict[str, str], message: str
) -> None:
    save_file(small_net().state_dict(), tmp_path / "a.safetensors", metadata)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "a.safetensors", small_net())


def test_a_model_pruned_twice_is_rebuilt_from_the_plain_one(tmp_path: Path) -> None:
    images = torch.randn(2, 3, 32, 32)
    once = cpx.prune(small_net(), images, ratio=0.25)
    twice = cpx.prune(once, images, ratio=0.5)
    save(twice, tmp_path / "a.safetensors")
    loaded = load(tmp_path / "a.safetensors", small_net())
    assert torch.equal(loaded.eval()(images), twice.eval()(images))
    third = cpx.prune(loaded, images, ratio=0.5)
    save(third, tmp_path / "b.safetensors")
    loaded = load(tmp_path / "b.safetensors", small_net())
    assert torch.equal(loaded.eval()(images), third.eval()(images))
    assert cpx.plan_of(loaded).params_before < sum(p.numel() for p in twice.parameters()) + 1


def test_a_pickled_model_carries_no_batch(tmp_path: Path) -> None:
    images = torch.randn(64, 3, 32, 32)
    pruned = cpx.prune(small_net(), images, ratio=0.5)
    torch.save(pruned, tmp_path / "a.pt")
    assert (tmp_path / "a.pt").stat().st_size < images.nbytes
    again = torch.load(tmp_path / "a.pt", weights_only=False)
    assert cpx.plan_of(again).to_dict() == cpx.plan_of(pruned).to_dict()
    assert cpx.plan_of(copy.deepcopy(pruned)) is not None


def test_the_first_difference_to_the_architecture_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save(small_net(), path)
    with pytest.raises(CheckpointError, match=r"'conv1\.weight' has shape \[4, 3, 3, 3\]"):
        load(path, CifarResNet(8, width=8))
    with pytest.raises(
        CheckpointError, match=r"has no 'layer1\.1\.conv1\.weight', which the model"
    ):
        load(path, CifarResNet(14, width=4))
    pruned = cpx.prune(small_net(), torch.zeros(1, 3, 32, 32), ratio=0.5)
    save(pruned, path)
    with pytest.raises(
        CheckpointError, match=r"a pruned chanprune_ext\.models\.CifarResNet.*conv1"
    ):
        load(path, CifarResNet(8, width=8))
    with pytest.raises(CheckpointError, match=r"read it with chanprune_ext\.load"):
        load_weights(small_net(), path)


@pytest.mark.parametrize(
    "form", ["plain", "state_dict", "model_state_dict", "model", "module.", "_orig_mod.", "args"]
)
def test_weights_in_the_usual_wrappings(tmp_path: Path, form: str) -> None:
    source = small_net(0)
    state = dict(source.state_dict())
    if form.endswith("."):
        state = {form + name: value for name, value in state.items()}
    content = state if form == "plain" or form.endswith(".") else {form: state, "epoch": 3}
    if form == "args":  # as torchvision's training script has them
        content = {"model": state, "args": argparse.Namespace(lr=0.1)}
    torch.save(content, tmp_path / "w.pth")
    target = small_net(1)
    assert load_weights(target, tmp_path / "w.pth") is target
    assert_same_state(source, target)


def test_batch_counters_may_be_missing_but_nothing_else(tmp_path: Path) -> None:
    state = {k: v for k, v in small_net(0).state_dict().items() if "num_batches" not in k}
    save_file(state, tmp_path / "a.safetensors")
    assert torch.equal(
        load_weights(small_net(1), tmp_path / "a.safetensors").bn1.bias, state["bn1.bias"]
    )
    del state["linear.bias"]
    save_file(state, tmp_path / "a.safetensors")
    target, before = small_net(1), small_net(1)
    with pytest.raises(CheckpointError, match=r"has no 'linear\.bias'"):
        load_weights(target, tmp_path / "a.safetensors")
    assert_same_state(target, before)


def test_wrong_weights_change_nothing(tmp_path: Path) -> None:
    target, before = small_net(1), small_net(1)
    state = small_net(0).state_dict()
    torch.save({**state, "linear.weight": state["linear.weight"].to(torch.int8)}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"'linear\.weight' has dtype torch\.int8"):
        load_weights(target, tmp_path / "w.pt")
    torch.save({**state, "more": torch.zeros(1)}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="holds 'more', which the model does not have"):
        load_weights(target, tmp_path / "w.pt")
    torch.save({**state, "epoch": 3}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="'epoch' is int"):
        load_weights(target, tmp_path / "w.pt")
    torch.save([1, 2], tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="expected a state dict, got list"):
        load_weights(target, tmp_path / "w.pt")
    assert_same_state(target, before)


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    torch.save(small_net(), tmp_path / "whole.pt")
    with pytest.raises(CheckpointError, match=r"save model\.state_dict\(\) alone") as caught:
        load_weights(small_net(), tmp_path / "whole.pt")
    assert str(caught.value).isprintable()
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:500])
    with pytest.raises(CheckpointError, match=r"cut\.pt: can't be read as weights"):
        load_weights(small_net(), tmp_path / "cut.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(CheckpointError, match=r"text\.pt: can't be read as weights"):
        load_weights(small_net(), tmp_path / "text.pt")
