"""Training in place: that it learns, that it is repeatable, and that it is all or nothing."""

from __future__ import annotations

import copy
import json
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import chanprune_ext as cpx
from chanprune_ext.data import make_loader, open_dataset
from chanprune_ext.errors import DataError, InvalidArgumentError, TrainingError
from chanprune_ext.models import CifarResNet
from chanprune_ext.recovery import Recipe, evaluate, recover

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def net(seed: int = 0, classes: int = 3) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, classes))


def points(n: int = 192, seed: int = 0) -> TensorDataset:
    """Three classes told apart by which pair of the six inputs is largest."""
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, x.view(n, 3, 2).sum(2).argmax(1))


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def run(student: nn.Module, teacher: nn.Module | None = None, **options: Any) -> Any:
    defaults: dict[str, Any] = {"train": points(), "epochs": 3, "batch_size": 32, "lr": 0.05}
    return recover(student, teacher, progress=False, **{**defaults, **options})


def test_fine_tuning_learns_the_labels() -> None:
    student = net()
    result = run(student, val=points(300, seed=1), epochs=12, lr=0.1)
    assert result.history[0].loss > 2 * result.history[-1].loss
    assert result.before.top1 < 0.6
    assert result.last.top1 > 0.85
    assert result.last == evaluate(student, points(300, seed=1))
    assert [record.epoch for record in result.history] == list(range(1, 13))
    assert all(record.images == 192 for record in result.history)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_distillation_moves_the_student_towards_the_teacher(optimizer: str) -> None:
    teacher, student = net(1), net(2)
    run(teacher, epochs=12, lr=0.1)
    x = points(300, seed=1).tensors[0]

    def distance() -> float:
        with torch.no_grad():
            s, t = student.eval()(x), teacher.eval()(x)
        return F.kl_div(s.log_softmax(1), t.softmax(1), reduction="batchmean").item()

    before, kept = distance(), state(teacher)
    lr = {"sgd": 0.05, "adamw": 0.02}[optimizer]
    run(student, teacher, epochs=8, losses={"kd": 1.0}, optimizer=optimizer, lr=lr)
    assert distance() < 0.2 * before
    assert same(kept, state(teacher))


def test_the_teacher_sees_the_students_images_and_is_handed_back_as_it_was() -> None:
    class Spy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net()
            self.seen: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(x)
            return self.inner(x)

    student, teacher = Spy(), Spy().train()
    teacher.inner[1].eval()
    run(student, teacher, epochs=1)
    assert len(student.seen) == len(teacher.seen) == 6
    assert all(torch.equal(a, b) for a, b in zip(student.seen, teacher.seen, strict=True))
    assert teacher.training
    assert not teacher.inner[1].training
    assert all(p.grad is None for p in teacher.parameters())
    assert teacher.inner[1].num_batches_tracked == 0


def test_without_labels_wrong_labels_do_not_matter() -> None:
    x, y = points().tensors
    teacher, one, two = net(1), net(2), net(2)
    run(one, teacher, losses={"kd": 0.9})
    run(two, teacher, losses={"kd": 0.9}, train=TensorDataset(x, (y + 1) % 3))
    assert same(state(one), state(two))
    run(two, teacher, losses={"kd": 0.9, "hard": 0.5}, train=TensorDataset(x, (y + 1) % 3))
    assert not same(state(one), state(two))


def test_one_update_is_the_textbook_formula() -> None:
    """Nesterov SGD from rest moves by lr (1 + momentum) (gradient + decay * weight)."""
    x, y = points(32).tensors
    teacher, student = net(1).eval(), net(2)
    expected = copy.deepcopy(student).train()
    s, t = expected(x), teacher(x)
    kl = F.kl_div((s / 2).log_softmax(1), (t / 2).softmax(1), reduction="batchmean")
    (0.7 * 4 * kl + 0.3 * F.cross_entropy(s, y, label_smoothing=0.1)).backward()
    run(
        student,
        teacher,
        train=[(x, y)],
        epochs=1,
        lr=0.1,
        warmup=0.0,
        momentum=0.8,
        weight_decay=0.01,
        temperature=2.0,
        losses={"kd": 0.7, "hard": 0.3},
        label_smoothing=0.1,
        max_grad_norm=None,
    )
    for (name, p), q in zip(expected.named_parameters(), student.parameters(), strict=True):
        decay = 0.01 if p.ndim > 1 else 0.0
        step = p.grad + decay * p.detach()
        torch.testing.assert_close(q, p.detach() - 0.1 * 1.8 * step, msg=name)
        assert q.grad is None


def test_gradients_are_scaled_down_to_the_limit() -> None:
    x, y = points(32).tensors
    student = net(2)
    before = state(student)
    options = {"lr": 1.0, "momentum": 0.0, "weight_decay": 0.0, "warmup": 0.0, "epochs": 1}
    run(student, train=[(x, y)], max_grad_norm=1e-3, **options)
    moved = [p - before[name] for name, p in student.named_parameters()]
    assert torch.cat([m.flatten() for m in moved]).norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_learning_rates_follow_the_schedule() -> None:
    result = run(net(), epochs=2, warmup=1.0, lr=0.4)
    # 6 updates of warm-up, then 6 along the cosine, the last of them at 5/6 of it
    assert result.history[0].lr == pytest.approx(0.4 * 6 / 7)
    assert result.history[1].lr == pytest.approx(0.2 * (1 + torch.pi**0 * -(3**0.5) / 2))


def test_runs_are_repeatable_and_leave_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    kept = torch.get_rng_state()
    results = []
    for seed in (1, 1, 2):
        student = nn.Sequential(net(), nn.Dropout(0.3))
        torch.set_rng_state(kept)
        run(student, seed=seed)
        assert torch.equal(torch.get_rng_state(), kept)
        results.append(state(student))
        torch.rand(3)
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


def test_average_of_weights_is_what_is_measured_and_kept() -> None:
    plain, averaged = net(), net()
    run(plain, epochs=2, lr=0.1)
    result = run(averaged, epochs=2, lr=0.1, ema_decay=0.9, val=points(300, seed=1))
    assert not same(state(plain), state(averaged))
    assert averaged[1].num_batches_tracked == 12
    assert evaluate(averaged, points(300, seed=1)) == result.last


def test_a_run_that_ends_before_its_average_begins_keeps_what_it_has_trained() -> None:
    student, wrong = net(), points(300, seed=1)
    wrong.tensors = (wrong.tensors[0], (wrong.tensors[1] + 1) % 3)
    before = state(student)
    result = run(student, val=wrong, epochs=10, lr=0.1, swa_start=0.9, patience=2)
    assert len(result.history) < 9
    assert not torch.equal(student[0].weight, before["0.weight"])
    assert result.last == evaluate(student, wrong)


def test_frozen_batch_norm_trains_what_evaluation_computes() -> None:
    student = net()
    student[1].running_mean.fill_(0.3)  # not what the points give
    before = state(student)
    result = run(student, lr=1e-9, freeze_batch_norm=True, losses={"hard": 1.0})
    assert student[1].num_batches_tracked == 0
    assert torch.equal(student[1].running_mean, before["1.running_mean"])
    measured = evaluate(student, points()).loss
    assert result.history[-1].loss == pytest.approx(measured, rel=1e-4)
    trained = copy.deepcopy(student)
    run(trained, lr=0.1, freeze_batch_norm=True)
    assert not torch.equal(trained[1].weight, student[1].weight)
    with pytest.raises(InvalidArgumentError, match="freeze_batch_norm, sync_batch_norm"):
        run(student, freeze_batch_norm=True, sync_batch_norm=True)


def test_best_weights_include_those_it_came_with() -> None:
    student, val = net(), points(300, seed=1)
    run(student, epochs=12, lr=0.1)
    good, wrong = state(student), points()
    wrong.tensors = (wrong.tensors[0], (wrong.tensors[1] + 1) % 3)
    result = run(student, train=wrong, val=val, keep="best", lr=0.2)
    assert result.kept_epoch == result.best_epoch == 0
    assert result.best == result.before
    assert result.last.top1 < result.before.top1
    assert same(state(student), good)


def test_best_epoch_is_kept_although_later_ones_were_worse() -> None:
    student, val = net(), points(300, seed=1)
    result = run(student, val=val, keep="best", epochs=6, lr=0.1)
    scores = [result.before.top1, *(record.val.top1 for record in result.history)]
    assert result.kept_epoch == scores.index(max(scores)) > 0
    assert evaluate(student, val) == result.best
    assert result.to_dict()["history"][0]["val"]["n"] == 300


def test_modes_gradients_and_frozen_parameters_survive() -> None:
    student = net().eval()
    student[0].weight.requires_grad_(False)
    frozen = student[0].weight.clone()
    student[1].train()
    run(student)
    assert [student.training, student[1].training, student[3].training] == [False, True, False]
    assert torch.equal(student[0].weight, frozen)
    assert not student[0].weight.requires_grad
    assert "_is_accelerate_prepared" not in student.__dict__


def test_the_student_keeps_its_forward_where_accelerate_is_set_to_mixed_precision() -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    student = net()
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        Accelerator(mixed_precision="bf16", cpu=True)
        run(student, epochs=1)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert not {"forward", "_original_forward"} & student.__dict__.keys()
    x = points().tensors[0]
    twin = copy.deepcopy(student)
    nn.init.zeros_(twin[3].weight)
    assert torch.equal(twin(x), twin[3].bias.expand(192, 3))


class Poisoned(nn.Module):
    """Spoils or fails the training pass of a given number."""

    def __init__(self, at: int, how: Any) -> None:
        super().__init__()
        self.inner, self.at, self.how, self.passes = net(), at, how, 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += self.training
        out = self.inner(x)
        if self.training and self.passes == self.at:
            if isinstance(self.how, BaseException):
                raise self.how
            return out * self.how
        return out


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_restores_the_student(poison: float) -> None:
    student = Poisoned(9, poison).eval()
    student.inner[0].weight.grad = torch.ones(16, 6)
    before = state(student)
    with pytest.raises(TrainingError, match=r"loss became (nan|inf) in epoch 2.*Lower lr"):
        run(student)
    assert same(state(student), before)
    assert not student.training
    assert torch.equal(student.inner[0].weight.grad, torch.ones(16, 6))
    assert student.passes == 9


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")])
def test_anything_else_that_goes_wrong_restores_the_student_too(error: BaseException) -> None:
    student, teacher = Poisoned(8, error), net(1).train()
    before = state(student)
    with pytest.raises(type(error)):
        run(student, teacher, ema_decay=0.9)
    assert same(state(student), before)
    assert teacher.training
    assert "_is_accelerate_prepared" not in student.__dict__


def test_weights_that_blow_up_in_the_last_update_are_noticed() -> None:
    x, y = points(32).tensors
    student = net()
    before = state(student)
    with pytest.raises(TrainingError, match="NaN or infinity after the last update"):
        run(student, train=[(x, y)], epochs=1, warmup=0.0, lr=1e38, weight_decay=1e3)
    assert same(state(student), before)


def test_images_are_augmented_anew_in_every_epoch() -> None:
    data = open_dataset("digits", "train", augment=True)
    seen: list[Tensor] = []

    class Recorder(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return super().forward(x.flatten(1))

    run(Recorder(64, 10), train=data, epochs=2, batch_size=1437)
    one, two = ({tuple(i.flatten().tolist()) for i in batch} for batch in seen)
    assert len(one & two) < 0.5 * len(one)


def test_full_batches_only_but_small_sets_whole() -> None:
    assert run(net(), epochs=1, batch_size=50).history[0].images == 150
    assert run(net(), epochs=1, batch_size=500).history[0].images == 192
    loader = make_loader(points(), 50)
    assert run(net(), train=loader, epochs=1).history[0].images == 192


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_layout_and_mixed_precision_train_a_convolutional_net(precision: str) -> None:
    torch.manual_seed(0)
    student = CifarResNet(8, in_channels=1, width=4)
    data = open_dataset("digits", "train", augment=True)
    result = run(
        student,
        train=data,
        epochs=2,
        lr=0.1,
        batch_size=64,
        channels_last=True,
        precision=precision,
    )
    assert result.history[1].loss < 0.8 * result.history[0].loss
    assert all(p.dtype == torch.float32 for p in student.parameters())
    assert all(p.is_contiguous() for p in student.parameters())


def test_progress_is_drawn_on_request(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(net(), epochs=1)
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("FORCE_COLOR", "1")  # what makes rich take the output for a terminal
    recover(net(), train=points(), val=points(), epochs=1, batch_size=32, progress=True)
    shown = capsys.readouterr().out
    assert "epoch 1/1" in shown
    assert "6/6" in shown


def test_a_log_has_a_line_for_every_epoch(capsys: pytest.CaptureFixture[str]) -> None:
    result = recover(net(), train=points(), val=points(), epochs=2, batch_size=32, progress=True)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    for line, record in zip(lines, result.history, strict=True):
        assert record.val is not None
        assert line.startswith(f"epoch {record.epoch}/2 loss {record.loss:.4f} lr ")
        assert f"val {100 * record.val.top1:.2f} %" in line


class Doubled(DataLoader[Any]):
    """Iterates in a way of its own: two batches, each with all inputs doubled."""

    def __len__(self) -> int:
        return 2

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for (x, y), _ in zip(super().__iter__(), range(2), strict=False):
            yield 2 * x, y


def test_a_loader_that_iterates_in_its_own_way_does_so_here() -> None:
    x, y = points(96).tensors
    one, two = net(), net()
    result = run(one, train=Doubled(points(96), 32))
    run(two, train=[(2 * x[:32], y[:32]), (2 * x[32:64], y[32:64])])
    assert result.history[0].images == 64
    assert same(state(one), state(two))


def test_callers_may_have_switched_gradients_off() -> None:
    one, two, three = net(), net(), net()
    run(one)
    with torch.no_grad():
        run(two)
    with torch.inference_mode():
        run(three)
        made_inside = net()
    assert same(state(one), state(two))
    assert same(state(one), state(three))
    with pytest.raises(InvalidArgumentError, match=r"'0.weight' was made under torch.inference_mo"):
        run(made_inside)
    run(copy.deepcopy(made_inside))


def test_a_loss_that_is_no_number_is_null_in_json(tmp_path: Path) -> None:
    class Broken(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            return out if self.training else out * float("nan")

    result = run(Broken(*net()), val=points(30))
    assert math.isnan(result.last.loss)
    result.save(tmp_path / "result.json")
    text = (tmp_path / "result.json").read_text()
    assert "NaN" not in text
    assert json.loads(text)["history"][-1]["val"]["loss"] is None
    assert Recipe.load(tmp_path / "result.json") == result.recipe


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield torch.zeros(6), 0


@pytest.mark.parametrize(
    ("train", "error", "message"),
    [
        ([], DataError, "train: expected at least one batch, got none"),
        (TensorDataset(torch.zeros(0, 6), torch.zeros(0).long()), DataError, "at least one image"),
        (iter([1]), InvalidArgumentError, "expected a dataset or batches with a length"),
        (DataLoader(Endless()), InvalidArgumentError, "length"),
        (Endless(), InvalidArgumentError, "length"),
        ([(torch.zeros(4, 6), torch.tensor([0, 1, 2, 3]))], DataError, "expected 0 to 2 .*got 3"),
        ([(torch.zeros(4, 6), torch.tensor([0, 1, 2, -1]))], DataError, "got -1"),
        (
            [torch.zeros(4, 6)],
            DataError,
            "expected a pair .* without labels train",
        ),
        (
            [(torch.zeros(4, 6), torch.zeros(3).long())],
            DataError,
            "one for each image, got 3 labels and logits of 4 images",
        ),
        (
            DataLoader(points(9), 4),
            DataError,
            "batch 3 of the epoch has 1 image, too few for batch norm.*drop_last=True",
        ),
    ],
)
def test_bad_training_data_change_nothing(train: Any, error: type[Exception], message: str) -> None:
    student = net()
    before = state(student)
    with pytest.raises(error, match=message):
        run(student, train=train)
    assert same(state(student), before)


def test_labels_that_no_loss_looks_at_need_not_be_classes() -> None:
    x = torch.zeros(4, 6)
    run(net(), net(1), train=[(x, torch.full((4,), -1))], losses={"kd": 1.0}, epochs=1)
    with pytest.raises(DataError, match="got -1"):
        run(net(), net(1), train=[(x, torch.full((4,), -1))], losses={"dkd": 1.0}, epochs=1)
    with pytest.raises(DataError, match="got 3 labels and logits of 4"):
        run(net(), net(1), train=[(x, torch.full((3,), -1))], losses={"kd": 1.0}, epochs=1)


def test_validation_data_that_are_used_up_by_one_pass_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match=r"val: expected data that can be gone through"):
        run(net(), val=(batch for batch in DataLoader(points(), 32)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs: expected at least 1, got 0"),
        ({"batch_size": 0}, "batch_size: expected at least 1"),
        ({"lr": 0.0}, "lr: expected None or a positive number"),
        ({"lr": float("nan")}, "lr: expected None or a positive number, got nan"),
        ({"momentum": 1.0}, "momentum: expected at least 0 and below 1"),
        ({"weight_decay": -1.0}, "weight_decay: expected zero or a positive number"),
        ({"warmup": 3.0}, "warmup: expected fewer than epochs = 3, got 3.0"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"temperature": 0.0}, "temperature: expected a positive number"),
        ({"losses": {"hard": 0.0}}, "losses: expected one weight above 0, got {'hard': 0.0}"),
        ({"losses": {"kl": 1.0}}, "losses: expected names among hard, kd, .*, got 'kl'"),
        ({"losses": {"hard": -1.0}}, r"losses\['hard'\]: expected zero or a positive number"),
        ({"losses": ["kd"]}, "losses: expected weights by name"),
        ({"losses": {"kd": 1.0}}, "teacher: needed by the losses kd"),
        ({"distill_weight": 0.5}, "distill_weight: no such setting; there are epochs, lr"),
        ({"mixup": 0.0}, "mixup: expected None or a positive number"),
        ({"swa_start": 1.0}, "swa_start: expected None or between 0 and 1"),
        ({"swa_start": 0.5, "ema_decay": 0.5}, "ema_decay, swa_start: expected one of them"),
        ({"patience": 2}, "patience: 2 needs validation data"),
        ({"max_grad_norm": 0.0}, "max_grad_norm: expected None or a positive number"),
        ({"ema_decay": 1.0}, "ema_decay: expected None or between 0 and 1"),
        ({"optimizer": "lbfgs"}, "optimizer: expected 'sgd' or 'adamw', got 'lbfgs'"),
        ({"precision": "fp8"}, "precision: expected 'fp32', 'bf16' or 'fp16'"),
        ({"keep": "first"}, "keep: expected 'last' or 'best'"),
        ({"keep": "best"}, "keep: 'best' needs validation data"),
        ({"workers": -1}, "workers"),
        ({"taps": 5}, "taps: expected None or names of modules, got 5"),
        ({"taps": ["one", 5]}, "taps: expected None or names of modules"),
        ({"seed": 2**70}, "seed: expected a number of 64 bits"),
        ({"epochs": 2.5}, "epochs: expected an integer, got 2.5"),
        ({"lr": "0.1"}, "lr: expected a number, got '0.1'"),
    ],
)
def test_settings_outside_their_range_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        run(net(), **options)


def test_models_that_do_not_fit_are_named() -> None:
    student = net()
    for wrapped in (student, nn.DataParallel(student), torch.compile(student, backend="eager")):
        with pytest.raises(InvalidArgumentError, match="teacher: is the student itself"):
            run(student, wrapped)
    teacher = nn.Sequential(student[0], *net(1)[1:])
    with pytest.raises(InvalidArgumentError, match=r"teacher: shares '0.weight' with the student"):
        run(student, teacher)
    teacher = nn.Sequential(*net(1)[:1], student[1].requires_grad_(False), *net(1)[2:])
    with pytest.raises(InvalidArgumentError, match=r"teacher: shares '1.running_mean' with"):
        run(student, teacher)
    run(student, teacher, freeze_batch_norm=True, epochs=1)  # which changes nothing there
    student.requires_grad_(True)
    with pytest.raises(
        InvalidArgumentError, match=r"teacher: expected logits \[32, 3\].*\[32, 4\]"
    ):
        run(student, net(classes=4))
    student.requires_grad_(False)
    with pytest.raises(InvalidArgumentError, match="none of its parameters requires a gradient"):
        run(student)


def test_a_pruned_network_gets_its_accuracy_back() -> None:
    torch.manual_seed(0)
    model = CifarResNet(8, in_channels=1, width=8)
    train, test = open_dataset("digits", "train", augment=True), open_dataset("digits")
    options: dict[str, Any] = {"train": train, "val": test, "batch_size": 64}
    original = run(model, epochs=3, lr=0.1, **options).last
    pruned = cpx.prune(model, torch.zeros(1, 1, 8, 8), ratio=0.5)
    # Enough epochs that the outcome does not hang on rounding, which threads change.
    result = run(pruned, model, epochs=12, lr=0.05, **options)
    assert result.before.top1 < 0.7 * original.top1
    assert result.last.top1 > 0.9 * original.top1
    assert cpx.plan_of(pruned) is not None
