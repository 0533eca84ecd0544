"""Whole runs with every kind of loss and option: they learn, are repeatable, and leave nothing."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import chanprune_ext as cpx
from chanprune_ext.data import open_dataset
from chanprune_ext.errors import CheckpointError, DataError, InvalidArgumentError, TrainingError
from chanprune_ext.models import CifarResNet
from chanprune_ext.recovery import Recipe, evaluate, recover
from chanprune_ext.recovery.ema import WeightAverage
from chanprune_ext.recovery.mixed_inputs import InputMixer, mirror_images
from chanprune_ext.recovery.objective import Objective

DIGITS: dict[str, Any] = {"batch_size": 64, "progress": False}


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    torch.manual_seed(0)
    model = CifarResNet(8, in_channels=1, width=8)
    recover(model, train=open_dataset("digits", "train", augment=True), epochs=4, lr=0.1, **DIGITS)
    return model


@pytest.fixture
def pruned(trained: nn.Module) -> nn.Module:
    return cpx.prune(trained, torch.zeros(1, 1, 8, 8), ratio=0.5)


def digits(n: int = 640) -> Tensor:
    data = open_dataset("digits", "train")
    return torch.stack([data[i][0] for i in range(n)])


def same(left: nn.Module, right: nn.Module) -> bool:
    a, b = left.state_dict(), right.state_dict()
    return all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    "settings",
    [
        {"losses": {"kd": 0.9, "hard": 0.1, "features": 1.0}},
        {"losses": {"dkd": 1.0, "hard": 1.0}},
        {"losses": {"dist": 2.0, "hard": 1.0}, "temperature": 1.0},
        {"losses": {"kd": 9.0, "hard": 0.1}, "standardise": True, "temperature": 2.0},
        {"losses": {"dkd": 9.0}, "standardise": True, "temperature": 2.0},
        {"losses": {"features": 1.0, "hard": 0.2}},
        {"losses": {"kd": 1.0, "statistics": 1.0}, "bn_weighted": True},
        {"losses": {"kd": 1.0, "attention": 5.0}},
        {"losses": {"kd": 0.9, "hard": 0.1}, "mixup": 1.0, "cutmix": 1.0},
        {"losses": {"kd": 1.0, "dkd": 0.2, "features": 1.0}, "feature_epochs": 2.0, "mixup": 0.2},
        {"losses": {"kd": 1.0, "features": 1.0}, "ema_decay": 0.97, "bn_batches": 8},
        {"losses": {"kd": 1.0}, "swa_start": 0.6, "bn_batches": 8},
        {"losses": {"kd": 0.2, "hard": 1.0, "features": 1.0}, "teacher_flip": True},
    ],
    ids=lambda s: "-".join([*s["losses"], *(k for k in s if k != "losses")]),
)
def test_every_mix_brings_a_pruned_network_back(
    trained: nn.Module, pruned: nn.Module, settings: dict[str, Any]
) -> None:
    teacher = evaluate(trained, open_dataset("digits")).top1
    kept = copy.deepcopy(trained)
    result = recover(
        pruned,
        trained,
        train=TensorDataset(digits(), open_dataset("digits", "train").labels[:640]),
        val=open_dataset("digits"),
        epochs=4,
        lr=0.05,
        **settings,
        **DIGITS,
    )
    assert teacher > 0.8
    assert result.before.top1 < 0.6 * teacher
    assert result.last.top1 > 0.75 * teacher
    assert result.last == evaluate(pruned, open_dataset("digits"))
    assert same(trained, kept)
    for model in (trained, pruned):
        assert not any(m._forward_hooks for m in model.modules())


def test_a_feature_loss_alone_brings_the_features_together(
    trained: nn.Module, pruned: nn.Module
) -> None:
    x = digits(64)

    def distance() -> float:
        recipe = Recipe(losses={"features": 1.0})
        with Objective(recipe, pruned.eval(), trained.eval()) as objective:
            return objective(pruned, x, None)[0].item()

    before = distance()
    recover(
        pruned,
        trained,
        train=[digits().split(64)[i] for i in range(10)],
        losses={"features": 1.0},
        epochs=4,
        lr=0.05,
        progress=False,
    )
    assert distance() < 0.5 * before


def test_the_sum_is_the_weighted_sum_of_its_terms(trained: nn.Module, pruned: nn.Module) -> None:
    x, y = digits(32), torch.arange(32) % 10
    weights = {"hard": 0.3, "kd": 0.7, "dkd": 0.2, "dist": 0.4, "features": 1.5, "attention": 2.0}
    weights["statistics"] = 0.6

    def loss(losses: dict[str, float], **options: Any) -> float:
        recipe = Recipe(losses=losses, label_smoothing=0.1, **options)
        with Objective(recipe, pruned.eval(), trained.eval()) as objective:
            return objective(pruned, x, y, 1.0)[0].item()

    parts = {name: loss({name: 1.0}) for name in weights if name != "hard"}
    parts["hard"] = loss({"hard": 1.0, "kd": 1.0}) - parts["kd"]
    scores = pruned(x)
    assert parts["hard"] == pytest.approx(
        F.cross_entropy(scores, y, label_smoothing=0.1).item(), rel=1e-4
    )
    expected = sum(weights[name] * part for name, part in parts.items())
    assert loss(weights) == pytest.approx(expected, rel=1e-5)
    # One epoch of four: three quarters of the weight of features are left.
    faded = 0.3 * parts["hard"] + 0.7 * parts["kd"] + 0.75 * 1.5 * parts["features"]
    some = {name: weights[name] for name in ("hard", "kd", "features")}
    assert loss(some, feature_epochs=4.0) == pytest.approx(faded, rel=1e-5)


class Unlabelled(TensorDataset):
    def __getitem__(self, index: int) -> Any:
        return super().__getitem__(index)[0]


@pytest.mark.parametrize(
    "train",
    [
        Unlabelled(digits(256)),
        TensorDataset(digits(256)),
        DataLoader(TensorDataset(digits(256)), 64),
        list(digits(256).split(64)),
    ],
    ids=["dataset", "tensor dataset", "loader", "tensors"],
)
def test_unlabelled_data_are_distilled_from(
    trained: nn.Module, pruned: nn.Module, train: Any
) -> None:
    options: dict[str, Any] = {"epochs": 1, "lr": 0.05, "batch_size": 64, "progress": False}
    twin = copy.deepcopy(pruned)
    result = recover(pruned, trained, train=train, **options)
    assert result.history[0].images == 256
    recover(twin, trained, train=train, losses={"kd": 1.0}, **options)
    assert same(pruned, twin)
    with pytest.raises(DataError, match="for the loss 'hard', got inputs alone"):
        recover(pruned, trained, train=train, losses={"kd": 0.9, "hard": 0.1}, **options)
    with pytest.raises(DataError, match="for the loss 'hard', got inputs alone"):
        recover(pruned, train=train, **options)


def test_a_teacher_that_the_losses_ignore_is_named(trained: nn.Module, pruned: nn.Module) -> None:
    with pytest.raises(InvalidArgumentError, match="one that learns from the teacher"):
        recover(pruned, trained, train=digits(64).split(32), losses={"hard": 1.0})


def test_mixing_is_a_matrix_of_shares() -> None:
    x = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 1, 4, 4).contiguous()
    torch.manual_seed(1)
    mixed, shares = InputMixer(Recipe(mixup=1.0))(x)
    torch.testing.assert_close(shares.sum(1), torch.ones(6))
    torch.testing.assert_close(mixed[:, 0, 0, 0], shares @ torch.arange(6.0))
    assert (shares > 0).sum() == 12
    cut, shares = InputMixer(Recipe(cutmix=1.0))(x)
    torch.testing.assert_close(cut.mean((1, 2, 3)), shares @ torch.arange(6.0))
    assert not InputMixer(Recipe())
    with pytest.raises(DataError, match=r"mixup, cutmix: expected batches of images"):
        InputMixer(Recipe(mixup=1.0))(torch.zeros(4, 3))


def test_mixed_labels_reach_the_hard_loss(pruned: nn.Module) -> None:
    x, y = digits(16), torch.arange(16) % 10
    torch.manual_seed(3)
    with Objective(Recipe(losses={"hard": 1.0}, mixup=1.0), pruned.eval(), None) as objective:
        found, size = objective(pruned, x, y)
    torch.manual_seed(3)
    mixed, shares = InputMixer(Recipe(mixup=1.0))(x)
    wanted = shares @ F.one_hot(y, 10).float()
    expected = -(wanted * pruned(mixed).log_softmax(1)).sum(1).mean()
    assert size == 16
    torch.testing.assert_close(found, expected)


class AskedTwice(nn.Module):
    """Answers with the mean over an image and its mirror image."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return (self.model(x) + self.model(torch.flip(x, (-1,)))) / 2


def test_a_teacher_is_asked_about_mirror_images(trained: nn.Module, pruned: nn.Module) -> None:
    x = digits(32)

    def loss(losses: dict[str, float], teacher: nn.Module = trained, **options: Any) -> float:
        recipe = Recipe(losses=losses, **options)
        with Objective(recipe, pruned.eval(), teacher.eval()) as objective:
            return objective(pruned, x, None)[0].item()

    kd, features = {"kd": 1.0}, {"features": 1.0}
    flipped = loss(kd, teacher_flip=True)
    assert flipped == pytest.approx(loss(kd, AskedTwice(trained)), rel=1e-5)
    assert abs(flipped - loss(kd)) > 0.01 * flipped
    # Features stay those of the image itself: the student sees no other.
    both = loss({**kd, **features}, teacher_flip=True)
    assert both == pytest.approx(flipped + loss(features), rel=1e-5)


def test_without_a_teacher_nobody_is_asked(pruned: nn.Module) -> None:
    with pytest.raises(InvalidArgumentError, match="teacher_flip: there is no teacher to ask"):
        recover(pruned, train=open_dataset("digits", "train"), teacher_flip=True, **DIGITS)


def test_features_alone_need_no_mirror_images() -> None:
    with pytest.raises(InvalidArgumentError, match=r"^losses, teacher_flip: .*'kd', 'dkd' or"):
        Recipe(losses={"features": 1.0}, teacher_flip=True)


def test_mirror_images_keep_their_layout() -> None:
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    mirrored = mirror_images(x)
    assert torch.equal(mirrored[..., 0], x[..., 4])
    assert torch.equal(mirror_images(mirrored), x)
    assert mirrored.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(DataError, match=r"teacher_flip: expected batches of images .*got \[4, 3\]"):
        mirror_images(torch.zeros(4, 3))
    with pytest.raises(DataError, match="got dict"):
        mirror_images({"pixels": x})


def test_a_recipe_survives_json_and_reproduces_the_run(
    trained: nn.Module, pruned: nn.Module, tmp_path: Any
) -> None:
    twin, other = copy.deepcopy(pruned), copy.deepcopy(pruned)
    train = open_dataset("digits", "train", augment=True)
    mix = {"kd": 1.0, "features": 0.5}
    result = recover(
        pruned,
        trained,
        train=train,
        losses=mix,
        taps=["layer?.0"],
        mixup=0.3,
        epochs=1,
        lr=0.05,
        seed=4,
        ema_decay=0.9,
        **DIGITS,
    )
    result.recipe.save(tmp_path / "recipe.json")
    recipe = Recipe.load(tmp_path / "recipe.json")
    assert recipe == result.recipe
    assert recipe.losses == mix
    assert recipe.taps == ("layer?.0",)
    recover(twin, trained, train=train, recipe=recipe, progress=False)
    assert same(pruned, twin)
    changed = recover(other, trained, train=train, recipe=recipe, seed=5, progress=False)
    assert changed.recipe == recipe.changed(seed=5)
    assert not same(pruned, other)
    result.save(tmp_path / "result.json")
    assert Recipe.load(tmp_path / "result.json") == recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read"),
        ("[]", "expected data of format"),
        ('{"epochs": 3}', "expected data of format"),
        ('{"format": "chanprune-recipe", "steps": 3}', "not readable by this version.*steps"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Any, text: str, message: str) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        Recipe.load(tmp_path / "r.json")


def test_batch_norm_statistics_go_with_the_averaged_weights(
    trained: nn.Module, pruned: nn.Module
) -> None:
    train = [(part, torch.zeros(len(part)).long()) for part in digits(256).split(64)]
    options: dict[str, Any] = {"train": train, "epochs": 1, "lr": 0.05, "progress": False}
    recover(pruned, trained, losses={"kd": 1.0}, swa_start=0.5, bn_batches=2, **options)
    mean = torch.zeros(())
    with torch.no_grad():
        for images, _ in train[:2]:
            mean = mean + pruned.conv1(images).mean((0, 2, 3)) / 2
    torch.testing.assert_close(pruned.bn1.running_mean, mean, rtol=1e-4, atol=1e-5)


def test_swa_is_the_mean_of_the_last_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    x, y = torch.randn(5, 8, 3), torch.randint(0, 2, (5, 8))
    seen: list[Tensor] = []
    update = WeightAverage.update

    def watched(average: WeightAverage, student: nn.Module) -> None:
        seen.append(student.weight.detach().clone())
        update(average, student)

    monkeypatch.setattr(WeightAverage, "update", watched)
    options: dict[str, Any] = {"epochs": 1, "lr": 0.1, "warmup": 0.0, "progress": False}
    result = recover(model, train=list(zip(x, y, strict=True)), swa_start=0.4, **options)
    assert len(seen) == 3
    torch.testing.assert_close(model.weight.detach(), torch.stack(seen).mean(0))
    # The cosine stands still from the second of five updates on.
    assert result.history[0].lr == pytest.approx(0.05 * (1 + math.cos(0.4 * math.pi)))


def test_training_stops_when_validation_does_not_improve(
    trained: nn.Module, pruned: nn.Module
) -> None:
    data = open_dataset("digits", "train")
    wrong = TensorDataset(digits(256), (data.labels[:256] + 1) % 10)
    student = copy.deepcopy(trained)
    result = recover(
        student,
        train=wrong,
        val=open_dataset("digits"),
        epochs=9,
        lr=0.05,
        patience=2,
        keep="best",
        **DIGITS,
    )
    assert len(result.history) == 2
    assert result.kept_epoch == 0
    assert same(student, trained)


def test_hooks_go_and_the_student_is_restored_when_a_run_fails(
    trained: nn.Module, pruned: nn.Module
) -> None:
    before = copy.deepcopy(pruned)
    poisoned = [(digits(64), torch.zeros(64).long()), (digits(64) * float("nan"), torch.zeros(64))]
    poisoned[1] = (poisoned[1][0], torch.zeros(64).long())
    with pytest.raises(TrainingError):
        recover(pruned, trained, train=poisoned, losses={"features": 1.0}, epochs=1, progress=False)
    assert same(pruned, before)
    for model in (trained, pruned):
        assert not any(m._forward_hooks for m in model.modules())


def test_a_compiled_student_learns_features_as_a_plain_one(
    trained: nn.Module, pruned: nn.Module
) -> None:
    twin = copy.deepcopy(pruned)
    options: dict[str, Any] = {"losses": {"kd": 1.0, "features": 1.0}, "epochs": 1, "lr": 0.05}
    options |= {"train": list(digits(128).split(64)), "progress": False}
    recover(torch.compile(pruned, backend="eager"), trained, **options)
    recover(twin, trained, **options)
    for name, value in pruned.state_dict().items():
        torch.testing.assert_close(value, twin.state_dict()[name], rtol=1e-4, atol=1e-5, msg=name)


def test_the_teacher_may_run_in_bfloat16(trained: nn.Module, pruned: nn.Module) -> None:
    seen: list[torch.dtype] = []
    handle = trained.linear.register_forward_hook(lambda _m, _i, out: seen.append(out.dtype))
    options: dict[str, Any] = {"train": [digits(64)], "epochs": 1, "progress": False}
    recover(
        pruned, trained, losses={"kd": 1.0, "features": 1.0}, teacher_precision="bf16", **options
    )
    handle.remove()
    assert seen[-1] == torch.bfloat16
