from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strided import FLOATS, LAYOUTS, strided, values
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from chanprune_ext.errors import InvalidArgumentError
from chanprune_ext.ops import (
    kd_kl_div,
    kd_kl_div_call,
    kd_kl_div_reference,
    kd_kl_div_with_gradient,
)

REDUCTIONS = ["none", "sum", "batchmean"]
# Classes: one; fewer than a vector; one more than a vector; the chunk of 1024 and its neighbours;
# several chunks with a remainder.
CLASSES = [1, 3, 10, 17, 100, 1023, 1024, 1025, 5003]
# Bounds of the loss of a row (of logits with standard deviation 3) and of its gradient's elements,
# against float64; a half-typed gradient is rounded to its own type.
LOSS_TOLERANCE = {torch.float64: 1e-12}
GRAD_TOLERANCE = {
    torch.float64: 1e-13,
    torch.float32: 2e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 1e-2,
}


def exact(student, teacher, temperature, labels, options):
    """The reference in float64."""
    return kd_kl_div_reference(
        student.double(), teacher.double(), temperature, labels=labels, **options
    )


def make_labels(shape, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, shape, generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < 0.2, -100, labels)


@given(
    leading=st.lists(st.sampled_from([0, 1, 2, 5]), max_size=2),
    classes=st.sampled_from(CLASSES),
    dtype=st.sampled_from(FLOATS),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
    temperature=st.sampled_from([0.5, 1.0, 4.0, 20.0]),
    offset=st.sampled_from([0.0, 40.0]),
    hard=st.booleans(),
    weights=st.tuples(st.sampled_from([0.0, 1.0, 0.3]), st.sampled_from([0.0, 0.7])),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    reduction=st.sampled_from(REDUCTIONS),
    seed=st.integers(0, 99),
)
def test_loss_and_gradient_equal_float64_reference(
    leading, classes, dtype, layouts, temperature, offset, hard, weights, smoothing, reduction, seed
):
    shape = [*leading, classes]
    student = strided((values(shape, dtype, seed) * 3 + offset).to(dtype), layouts[0])
    teacher = strided((values(shape, dtype, seed + 1) * 3 - offset).to(dtype), layouts[1])
    labels = make_labels(shape[:-1], classes, seed) if hard else None
    options = {
        "soft_weight": weights[0],
        "hard_weight": weights[1] if hard else 0.0,
        "label_smoothing": smoothing,
        "reduction": reduction,
    }
    student = student.detach().requires_grad_()
    wide = student.detach().double().requires_grad_()
    loss = kd_kl_div(student, teacher, temperature, labels=labels, **options)
    expected = exact(wide, teacher, temperature, labels, options)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.shape == expected.shape
    rows = max(1, math.prod(leading)) if reduction == "sum" else 1
    tolerance = LOSS_TOLERANCE.get(dtype, 3e-5) * rows * max(1.0, temperature)
    torch.testing.assert_close(loss.double(), expected, rtol=5e-6, atol=tolerance)

    (gradient,) = torch.autograd.grad(loss.sum(), student)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), wide)
    assert gradient.dtype == dtype
    torch.testing.assert_close(
        gradient.double(),
        expected_gradient,
        rtol=GRAD_TOLERANCE[dtype] * 2,
        atol=GRAD_TOLERANCE[dtype] * max(1.0, temperature) * 0.1,
    )


def test_equals_the_torch_functions():
    student, teacher = torch.randn(2, 7, 11).double()
    labels = torch.randint(0, 11, (7,))
    soft = F.kl_div(
        F.log_softmax(student / 3, 1),
        F.log_softmax(teacher / 3, 1),
        reduction="batchmean",
        log_target=True,
    )
    hard = F.cross_entropy(student, labels, label_smoothing=0.1)
    both = kd_kl_div(
        student,
        teacher,
        3.0,
        labels=labels,
        soft_weight=0.4,
        hard_weight=0.6,
        label_smoothing=0.1,
    )
    torch.testing.assert_close(kd_kl_div(student, teacher, 3.0), 9 * soft)
    torch.testing.assert_close(both, 0.4 * 9 * soft + 0.6 * hard)


def test_reductions_belong_together(native_device):
    student, teacher = torch.randn(2, 6, 13, device=native_device).double()
    labels = make_labels((6,), 13, 1).to(native_device)
    loss = {
        reduction: kd_kl_div(student, teacher, labels=labels, hard_weight=1.0, reduction=reduction)
        for reduction in REDUCTIONS
    }
    torch.testing.assert_close(loss["none"].sum(), loss["sum"])
    torch.testing.assert_close(loss["sum"] / 6, loss["batchmean"])


@pytest.mark.parametrize(("rows", "classes"), [(9, 10), (9, 1000), (9, 3000), (1500, 10)])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_regime(native_device, dtype, rows, classes):
    student = (torch.randn(rows, classes, device=native_device) * 3).to(dtype).requires_grad_()
    teacher = (torch.randn(rows, classes, device=native_device) * 3).to(dtype)
    labels = make_labels((rows,), classes, 0).to(native_device)
    options = {"hard_weight": 0.5, "label_smoothing": 0.1}
    wide = student.detach().double().requires_grad_()
    loss = kd_kl_div(student, teacher, 4.0, labels=labels, **options)
    expected = exact(wide, teacher, 4.0, labels, options)
    torch.testing.assert_close(loss.double(), expected, rtol=5e-6, atol=0)
    loss.backward()
    expected.backward()
    tolerance = GRAD_TOLERANCE[dtype]
    torch.testing.assert_close(
        student.grad.double(), wide.grad, rtol=2 * tolerance, atol=tolerance / 10
    )


def test_gradient_relative_error_in_float32():
    student, teacher = torch.randn(2, 64, 1000) * 4
    student.requires_grad_()
    wide = student.detach().double().requires_grad_()
    kd_kl_div(student, teacher, 4.0).backward()
    kd_kl_div_reference(wide, teacher.double(), 4.0).backward()
    error = (student.grad - wide.grad).norm() / wide.grad.norm()
    assert error < 1e-6


def test_bfloat16_is_computed_in_float32():
    student, teacher = (torch.randn(2, 64, 1000)).bfloat16()
    error = kd_kl_div(student, teacher, 4.0).double() / kd_kl_div(
        student.double(), teacher.double(), 4.0
    )
    assert abs(error - 1) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_gradient_is_the_float32_gradient_rounded(native_device, dtype):
    # Spread over many magnitudes, so that the gradient has normal, subnormal and zero elements.
    student, teacher = (torch.randn(2, 32, 1030, device=native_device) * 8).to(dtype)
    gradients = []
    for cast in (dtype, torch.float32):
        leaf = student.detach().to(cast).requires_grad_()
        kd_kl_div(leaf, teacher.to(cast), 1.0, gradient_in_forward=False).backward()
        gradients.append(leaf.grad)
    assert torch.equal(gradients[0], gradients[1].to(dtype))


def test_teacher_of_another_dtype():
    student, teacher = torch.randn(2, 4, 9)
    mixed = kd_kl_div(student.bfloat16(), teacher)
    torch.testing.assert_close(mixed, kd_kl_div(student.bfloat16().float(), teacher))


# ---- classes without probability ---------------------------------------------------------------


@pytest.mark.parametrize("classes", [8, 3000])
def test_classes_the_teacher_excludes_add_nothing(native_device, classes):
    student, teacher = torch.randn(2, 3, classes, device=native_device)
    # The first half, so that whole chunks of a long row are excluded before anything is seen.
    teacher[:, : classes // 2] = -math.inf
    student.requires_grad_()
    loss = kd_kl_div(student, teacher, 2.0, reduction="none")
    q = (teacher.double() / 2).softmax(1)
    log_p = (student.double() / 2).log_softmax(1)
    kept = slice(classes // 2, None)
    expected = 4 * (q[:, kept] * (q[:, kept].log() - log_p[:, kept])).sum(1)
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    loss.sum().backward()
    torch.testing.assert_close(
        student.grad.double(), (2 * (log_p.exp() - q)).detach(), rtol=1e-5, atol=1e-7
    )


def test_classes_both_exclude_add_nothing(native_device):
    student, teacher = torch.randn(2, 3, 40, device=native_device)
    expected = kd_kl_div(student[:, :30], teacher[:, :30])
    student[:, 30:] = teacher[:, 30:] = -math.inf
    student.requires_grad_()
    loss = kd_kl_div(student, teacher)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert torch.equal(student.grad[:, 30:], torch.zeros(3, 10, device=native_device))


@pytest.mark.parametrize("classes", [8, 3000])
def test_a_class_only_the_student_excludes_is_infinitely_wrong(native_device, classes):
    student, teacher = torch.randn(2, 2, classes, device=native_device)
    student[0, : classes // 2] = -math.inf
    loss = kd_kl_div(student, teacher, reduction="none")
    assert loss[0] == math.inf
    assert loss[1].isfinite()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_nan_and_inf_are_not_hidden(native_device, which, bad):
    logits = torch.randn(2, 3, 50, device=native_device)
    logits[which, 1, 20] = bad
    loss = kd_kl_div(logits[0], logits[1], reduction="none")
    assert loss.isnan().tolist() == [False, True, False]


def test_a_row_without_any_class_is_nan(native_device):
    logits = torch.randn(2, 2, 8, device=native_device)
    logits[1, 0] = -math.inf
    loss = kd_kl_div(logits[0], logits[1], reduction="none")
    assert loss.isnan().tolist() == [True, False]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("classes", [8, 300, 3000])
@pytest.mark.parametrize("early", [True, False])
def test_a_teacher_that_does_not_count_shows_nowhere(native_device, early, classes, bad):
    student, teacher = torch.randn(2, 3, classes, device=native_device)
    student.requires_grad_()
    teacher[0] = bad
    teacher[1, 0] = bad
    labels = torch.tensor([1, 5, -100], device=native_device)
    options = {"labels": labels, "soft_weight": 0.0, "hard_weight": 1.0, "reduction": "sum"}
    loss = kd_kl_div(student, teacher, gradient_in_forward=early, **options)
    expected = F.cross_entropy(student, labels, reduction="sum")
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, student)[0])


def test_far_logits_do_not_overflow():
    student = torch.tensor([[300.0, -300.0, 0.0]])
    teacher = torch.tensor([[-300.0, 300.0, 0.0]])
    loss = kd_kl_div(student, teacher, 1.0)
    torch.testing.assert_close(loss, torch.tensor(600.0))


# ---- labels -------------------------------------------------------------------------------------


def test_ignored_rows_keep_their_soft_term(native_device):
    student, teacher = torch.randn(2, 4, 6, device=native_device)
    labels = torch.tensor([1, -7, 3, -7], device=native_device)
    options = {"labels": labels, "ignore_index": -7, "reduction": "none"}
    both = kd_kl_div(student, teacher, hard_weight=1.0, **options)
    soft = kd_kl_div(student, teacher, reduction="none")
    assert torch.equal(both[[1, 3]], soft[[1, 3]])
    assert (both[[0, 2]] > soft[[0, 2]]).all()


@pytest.mark.parametrize("function", [kd_kl_div, kd_kl_div_with_gradient])
def test_out_of_range_labels_are_named(function):
    logits = torch.randn(2, 3, 5)
    with pytest.raises(InvalidArgumentError, match=r"labels should be in \[0, 5\).*got 5"):
        function(*logits, labels=torch.tensor([0, 5, 1]), hard_weight=1.0)


@pytest.mark.cuda
def test_out_of_range_labels_give_nan_on_cuda():
    student, teacher = torch.randn(2, 3, 5, device="cuda")
    options = {"labels": torch.tensor([0, 5, 1], device="cuda"), "hard_weight": 1.0}
    loss, gradient = kd_kl_div_with_gradient(student, teacher, reduction="none", **options)
    assert loss.isnan().tolist() == [False, True, False]
    assert gradient.isnan().all(1).tolist() == [False, True, False]
    student.requires_grad_()
    loss = kd_kl_div(student, teacher, reduction="none", **options)
    assert loss.isnan().tolist() == [False, True, False]
    loss.sum().backward()
    assert student.grad.isnan().all(1).tolist() == [False, True, False]


# ---- registration -------------------------------------------------------------------------------


def samples(device: torch.device, requires_grad: bool):
    """Arguments of the operator itself: flat logits, options in order, reduction as a number."""
    student, teacher = torch.randn(2, 4, 6, device=device)
    student.requires_grad_(requires_grad)
    labels = torch.tensor([0, 5, -100, 2], device=device)
    weights = torch.tensor([0.5, 0.0, 2.0, 1.0], device=device)
    for reduction in (0, 1, 2):
        yield student, teacher, None, None, 4.0, 1.0, 0.0, 0.0, -100, reduction
        yield student, teacher, labels, weights, 2.0, 0.5, 0.5, 0.1, -100, reduction
    if not requires_grad:
        empty = student.new_empty(0, 6)
        yield empty, empty.clone(), None, None, 4.0, 1.0, 0.0, 0.0, -100, 2


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(native_device, requires_grad):
    for arguments in samples(native_device, requires_grad):
        torch.library.opcheck(torch.ops.chanprune.kd_kl_div, arguments)


def test_opcheck_of_the_backward(native_device):
    for student, teacher, *others in samples(native_device, False):
        loss, statistics = torch.ops.chanprune.kd_kl_div(student, teacher, *others)
        torch.library.opcheck(
            torch.ops.chanprune.kd_kl_div_backward,
            (torch.ones_like(loss), student, teacher, statistics, *others),
        )


def test_opcheck_of_the_forward_with_gradient(native_device):
    for arguments in samples(native_device, False):
        torch.library.opcheck(torch.ops.chanprune.kd_kl_div_with_gradient, arguments)


# ---- where the gradient is made -----------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(3, 10), (40, 10), (37, 100), (3, 2, 1500)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_gradient_of_the_forward_is_that_of_the_backward(native_device, dtype, shape, reduction):
    student, teacher = torch.randn(2, *shape, device=native_device).to(dtype)
    student.requires_grad_()
    labels = make_labels(shape[:-1], shape[-1], 0).to(native_device)
    weights = torch.rand(shape[:-1], device=native_device)
    options = {"labels": labels, "hard_weight": 0.3, "weights": weights, "reduction": reduction}
    results = []
    for early in (True, False):
        loss = kd_kl_div(student, teacher, gradient_in_forward=early, **options)
        upstream = torch.linspace(0.5, 2, loss.numel(), device=native_device).view(loss.shape)
        (gradient,) = torch.autograd.grad(loss, student, upstream.to(loss.dtype))
        results.append((loss, gradient))
    tolerance = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(results[0][0], results[1][0], rtol=5e-6, atol=1e-6)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=tolerance, atol=tolerance / 10)


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("shape", [(4, 10), (2, 2, 10)])
def test_a_graph_can_be_differentiated_again(native_device, early, shape):
    student, teacher = torch.randn(2, *shape, device=native_device)
    student.requires_grad_()
    loss = kd_kl_div(student, teacher, gradient_in_forward=early)
    (first,) = torch.autograd.grad(loss, student, retain_graph=True)
    copy = first.clone()
    first.zero_()  # the gradient belongs to the caller
    (second,) = torch.autograd.grad(loss * 3, student, retain_graph=True)
    (third,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(second, copy * 3)
    torch.testing.assert_close(third, copy)


def test_float16_gradient_in_the_forward_is_refused():
    logits = torch.zeros(2, 3, dtype=torch.float16, requires_grad=True)
    with pytest.raises(InvalidArgumentError, match="gradient_in_forward should not be set for flo"):
        kd_kl_div(logits, logits.detach(), gradient_in_forward=True)


# ---- loss and gradient in one call --------------------------------------------------------------


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float64),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(6, 10), (2, 3, 1500), (0, 4), (5,)])
def test_loss_and_gradient_are_those_of_autograd(
    native_device, monkeypatch, shape, dtypes, reduction, native
):
    student = (torch.randn(shape, device=native_device) * 3).to(dtypes[0]).requires_grad_()
    teacher = (torch.randn(shape, device=native_device) * 3).to(dtypes[1])
    rows = shape[:-1]
    mask = torch.arange(math.prod(rows), device=native_device).view(rows) != 1
    labels = make_labels(rows, shape[-1], 0).to(native_device)
    simple = {"reduction": reduction}
    full = {"labels": labels, "hard_weight": 0.5, "label_smoothing": 0.1, "mask": mask, **simple}
    for options in (simple, full):
        expected = kd_kl_div(student, teacher, 2.0, **options)
        (expected_gradient,) = torch.autograd.grad(expected.sum(), student)
        with monkeypatch.context() as patch:
            if not native:
                patch.setattr(kd_kl_div_call, "_HAS_CPU", False)
                patch.setattr(kd_kl_div_call, "native_available", lambda _: False)
            loss, gradient = kd_kl_div_with_gradient(student, teacher, 2.0, **options)
        assert not loss.requires_grad
        assert not gradient.requires_grad
        assert loss.dtype == expected.dtype
        assert gradient.dtype == student.dtype
        torch.testing.assert_close(loss, expected.detach())
        torch.testing.assert_close(gradient, expected_gradient)


def test_a_training_step_by_the_gradient_alone():
    layer, inputs, teacher = torch.nn.Linear(6, 4), torch.randn(8, 6), torch.randn(8, 4)
    kd_kl_div(layer(inputs), teacher).backward()
    expected, layer.weight.grad = layer.weight.grad, None
    logits = layer(inputs)
    logits.backward(kd_kl_div_with_gradient(logits, teacher)[1])
    torch.testing.assert_close(layer.weight.grad, expected)


def test_loss_and_gradient_under_compile():
    def step(student, teacher):
        loss, gradient = kd_kl_div_with_gradient(student * 2, teacher, 3.0)
        return loss + 1, gradient * 2

    student, teacher = torch.randn(2, 5, 7)
    student.requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(compiled(student, teacher), step(student, teacher), strict=True):
        torch.testing.assert_close(ours, expected)


def test_what_has_no_loss_and_gradient_is_told():
    student, teacher = torch.randn(2, 3, 4)
    half = student.half()
    with pytest.raises(InvalidArgumentError, match="makes no gradients for float16 logits"):
        kd_kl_div_with_gradient(half, half)
    with pytest.raises(InvalidArgumentError, match="teacher should not require gradients"):
        kd_kl_div_with_gradient(student, teacher.requires_grad_())
    with pytest.raises(InvalidArgumentError, match="teacher should have the shape"):
        kd_kl_div_with_gradient(student, teacher.detach()[:2])
    with pytest.raises(InvalidArgumentError, match="student should be"):
        kd_kl_div_with_gradient([1.0], teacher)
    with pytest.raises(InvalidArgumentError, match=r"grad_and_value of kd_kl_div"):
        torch.func.vmap(kd_kl_div_with_gradient)(student[None], teacher.detach()[None])


# ---- weights and mask ---------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("classes", [5, 60, 1500])
@pytest.mark.parametrize("early", [True, False])
def test_weights_and_mask_equal_the_rows_chosen_by_hand(native_device, classes, early, reduction):
    student, teacher = torch.randn(2, 3, 7, classes, device=native_device)
    weights = torch.rand(3, 7, device=native_device)
    mask = (torch.arange(21, device=native_device) % 3 != 1).view(3, 7)
    student[~mask] = math.nan  # padding may hold anything
    teacher[~mask] = math.inf
    student.requires_grad_()
    labels = make_labels((3, 7), classes, 3).to(native_device)
    options = {"hard_weight": 0.4, "label_smoothing": 0.1, "reduction": reduction}
    loss = kd_kl_div(
        student,
        teacher,
        labels=labels,
        weights=weights,
        mask=mask,
        gradient_in_forward=early,
        **options,
    )
    chosen = student.detach()[mask].double().requires_grad_()
    rows = kd_kl_div_reference(
        chosen,
        teacher[mask].double(),
        labels=labels[mask],
        **{**options, "reduction": "none"},
    )
    rows = rows * weights[mask]
    expected = {"none": rows, "sum": rows.sum(), "batchmean": rows.mean()}[reduction]
    found = loss if reduction != "none" else loss[mask]
    torch.testing.assert_close(found.double(), expected, rtol=5e-6, atol=1e-6)
    if reduction == "none":
        assert torch.equal(loss[~mask], torch.zeros(7, device=native_device))
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), chosen)
    torch.testing.assert_close(gradient[mask].double(), expected_gradient, rtol=5e-6, atol=1e-6)
    assert torch.equal(gradient[~mask], torch.zeros(7, classes, device=native_device))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("early", [True, False])
def test_rows_left_out_keep_zero_gradients_under_infinite_ones(native_device, early, reduction):
    student, teacher = torch.randn(2, 4, 6, device=native_device)
    student.requires_grad_()
    mask = torch.tensor([True, False, True, False], device=native_device)
    options = {"mask": mask, "reduction": reduction, "gradient_in_forward": early}
    loss = kd_kl_div(student, teacher, **options)
    (gradient,) = torch.autograd.grad(loss, student, torch.full_like(loss, math.inf))
    assert torch.equal(gradient[~mask], torch.zeros(2, 6, device=native_device))


@pytest.mark.parametrize("reduction", ["sum", "batchmean"])
def test_everything_masked_is_zero(native_device, reduction):
    student, teacher = torch.randn(2, 4, 6, device=native_device)
    student.requires_grad_()
    mask = torch.zeros(4, dtype=torch.bool, device=native_device)
    loss = kd_kl_div(student, teacher, mask=mask, reduction=reduction)
    assert loss.item() == 0
    loss.backward()
    assert torch.equal(student.grad, torch.zeros_like(student))


def test_reference_takes_weights_and_mask_likewise():
    student, teacher = torch.randn(2, 5, 9)
    weights, mask = torch.rand(5), torch.tensor([True, False, True, True, False])
    for reduction in REDUCTIONS:
        options = {"weights": weights, "mask": mask, "reduction": reduction}
        torch.testing.assert_close(
            kd_kl_div(student, teacher, **options), kd_kl_div_reference(student, teacher, **options)
        )


# ---- derivatives --------------------------------------------------------------------------------


def test_an_upstream_gradient_reaches_half_logits_unrounded(native_device):
    # 1 / rows alone would vanish in float16; a loss scaler keeps it, if it comes before rounding.
    student, teacher = torch.randn(2, 2000, 4, device=native_device).half()
    student.requires_grad_()
    (kd_kl_div(student, teacher) * 2.0**16).backward()
    wide = student.detach().double().requires_grad_()
    (kd_kl_div_reference(wide, teacher.double()) * 2.0**16).backward()
    torch.testing.assert_close(student.grad.double(), wide.grad, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("hard", [False, True])
def test_gradcheck(native_device, hard, reduction):
    student = torch.randn(3, 2, 5, dtype=torch.float64, device=native_device).transpose(0, 1)
    teacher = torch.randn(2, 3, 5, dtype=torch.float64, device=native_device)
    labels = torch.tensor([[0, 4, -100], [1, 1, 2]], device=native_device) if hard else None
    options = {"hard_weight": 0.6, "label_smoothing": 0.2} if hard else {}
    student.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s: kd_kl_div(s, teacher, 2.5, labels=labels, reduction=reduction, **options),
        student,
    )


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradgradcheck(native_device, reduction, early):
    student, teacher = torch.randn(2, 3, 5, dtype=torch.float64, device=native_device)
    student.requires_grad_()
    options = {
        "labels": torch.tensor([0, -100, 4], device=native_device),
        "hard_weight": 0.6,
        "label_smoothing": 0.2,
        "weights": torch.tensor([1.0, 0.5, 2.0], device=native_device),
        "mask": torch.tensor([True, True, False], device=native_device),
        "reduction": reduction,
        "gradient_in_forward": early,
    }
    assert torch.autograd.gradcheck(lambda s: kd_kl_div(s, teacher, 2.5, **options), student)
    assert torch.autograd.gradgradcheck(lambda s: kd_kl_div(s, teacher, 2.5, **options), student)


def test_the_operator_itself_refuses_a_second_derivative(native_device):
    student, teacher = torch.randn(2, 3, 5, device=native_device)
    student.requires_grad_()
    loss = torch.ops.chanprune.kd_kl_div(student, teacher, None, None, *OPTIONS)[0]
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiated once"):
        gradient.sum().backward()


def test_torch_func_transforms(native_device):
    student, teacher = torch.randn(2, 4, 3, 6, dtype=torch.float64, device=native_device)

    def loss(s, t):
        return kd_kl_div(s, t, 2.0)

    batched = torch.func.vmap(loss)(student, teacher)
    expected = torch.stack([loss(s, t) for s, t in zip(student, teacher, strict=True)])
    torch.testing.assert_close(batched, expected)
    gradients = torch.func.vmap(torch.func.grad(loss))(student, teacher)
    for s, t, gradient in zip(student, teacher, gradients, strict=True):
        leaf = s.clone().requires_grad_()
        torch.testing.assert_close(gradient, torch.autograd.grad(loss(leaf, t), leaf)[0])
    torch.func.hessian(loss)(student[0], teacher[0])


def test_forward_mode_keeps_the_tangent(native_device):
    student, teacher, direction = torch.randn(3, 4, 5, dtype=torch.float64, device=native_device)
    leaf = student.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(kd_kl_div(leaf, teacher), leaf)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(student, direction)
        tangent = forward_ad.unpack_dual(kd_kl_div(dual, teacher)).tangent
    torch.testing.assert_close(tangent, (gradient * direction).sum())


@pytest.mark.parametrize("early", [True, False])
def test_batched_gradients(native_device, early):
    student, teacher = torch.randn(2, 4, 5, device=native_device)
    mask = torch.tensor([True, True, False, True], device=native_device)

    def losses(s):
        options = {"mask": mask, "reduction": "none", "gradient_in_forward": early}
        return kd_kl_div(s, teacher, **options)

    jacobian = torch.autograd.functional.jacobian
    torch.testing.assert_close(jacobian(losses, student, vectorize=True), jacobian(losses, student))
    student.requires_grad_()
    upstream = torch.tensor([1.0, 3.0], device=native_device)
    total = losses(student).sum()
    (batch,) = torch.autograd.grad(total, student, upstream, True, is_grads_batched=True)
    torch.testing.assert_close(batch[1], batch[0] * 3)


def test_the_gradient_can_be_faked_and_traced():
    def gradient(student, teacher):
        student = student.detach().requires_grad_()
        return torch.autograd.grad(kd_kl_div(student, teacher), student)[0]

    logits = torch.randn(2, 4, 5)
    with FakeTensorMode():
        assert gradient(torch.empty(4, 5), torch.empty(4, 5)).shape == (4, 5)
    traced = make_fx(gradient, tracing_mode="fake")(*logits)
    torch.testing.assert_close(traced(*logits), gradient(*logits))


def test_compiles_with_options_that_change(native_device):
    student, teacher = torch.randn(2, 4, 5, device=native_device)

    def loss(temperature, soft_weight):
        return kd_kl_div(student, teacher, temperature, soft_weight=soft_weight)

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="eager")
    for options in ((4.0, 1.0), (3.0, 0.5), (2.0, 0.25)):
        torch.testing.assert_close(compiled(*options), loss(*options))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("shape", [(8, 10), (2, 4, 10)])
def test_compiles_in_one_graph(native_device, backend, shape):
    student, teacher = torch.randn(2, *shape, device=native_device)
    labels = torch.randint(0, 10, shape[:-1], device=native_device)
    options = {
        "labels": labels,
        "hard_weight": 0.5,
        "label_smoothing": 0.1,
        "weights": torch.rand(shape[:-1], device=native_device),
        "mask": labels > 2,
    }
    student.requires_grad_()

    def loss(s, t):
        return kd_kl_div(s, t, 4.0, **options)

    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(student, teacher), loss(student, teacher))
    (expected,) = torch.autograd.grad(loss(student, teacher), student)
    (gradient,) = torch.autograd.grad(compiled(student, teacher), student)
    torch.testing.assert_close(gradient, expected)


def test_result_does_not_depend_on_threads():
    student, teacher = torch.randn(2, 300, 1000)
    before = torch.get_num_threads()
    once = kd_kl_div(student, teacher)
    try:
        torch.set_num_threads(1 if before > 1 else 2)
        again = kd_kl_div(student, teacher)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(once, again)


def test_memory_is_the_gradient_and_little_else():
    student, teacher = torch.randn(2, 256, 4000)
    student.requires_grad_()
    with torch.profiler.profile(profile_memory=True) as profile:
        kd_kl_div(student, teacher).backward()
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.events())
    assert allocated < 1.1 * student.numel() * student.element_size()


# ---- refusals -----------------------------------------------------------------------------------

LOGITS = torch.zeros(2, 3)
LABELS = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((LOGITS, LOGITS[:1]), {}, r"teacher should have the shape.*\(2, 3\).*got \(1, 3\)"),
        ((LOGITS[:, :0], LOGITS[:, :0]), {}, r"at least one class, got shape \(2, 0\)"),
        ((torch.tensor(1.0), torch.tensor(1.0)), {}, "at least one class"),
        ((LOGITS.int(), LOGITS), {}, "student should hold float16.*int32"),
        ((LOGITS, LOGITS.bool()), {}, "teacher should hold float16.*bool"),
        ((LOGITS, LOGITS.clone().requires_grad_()), {}, r"teacher\.detach\(\)"),
        ((LOGITS, LOGITS, 0.0), {}, "temperature should be a finite number above 0, got 0"),
        ((LOGITS, LOGITS, math.nan), {}, "temperature should be a finite number above 0"),
        ((LOGITS, LOGITS), {"soft_weight": -1.0}, "finite and not negative"),
        ((LOGITS, LOGITS), {"hard_weight": 0.5}, "needs labels"),
        ((LOGITS, LOGITS), {"labels": LABELS[:1]}, r"labels should be int64 .*\(2,\)"),
        ((LOGITS, LOGITS), {"labels": LABELS.int()}, "labels should be int64 .*int32"),
        ((LOGITS, LOGITS), {"label_smoothing": 1.5}, r"label_smoothing should be in \[0, 1\]"),
        ((LOGITS, LOGITS), {"weights": LABELS}, r"weights should be floating-point .*int64"),
        (
            (LOGITS, LOGITS),
            {"weights": torch.ones(3)},
            r"weights should be .*\(2,\) on cpu.*\(3,\)",
        ),
        (
            (LOGITS, LOGITS),
            {"weights": torch.ones(2, requires_grad=True)},
            r"weights should not require gradients",
        ),
        ((LOGITS, LOGITS), {"mask": LABELS}, r"mask should be booleans .*int64"),
        ((LOGITS, LOGITS), {"reduction": "mean"}, "none, sum, batchmean, got 'mean'"),
        ((LOGITS, LOGITS.tolist()), {}, "teacher should be a tensor, got list"),
        ((LOGITS, LOGITS), {"labels": [0, 1]}, "labels should be a tensor, got list"),
        ((LOGITS, LOGITS), {"mask": [True, False]}, "mask should be a tensor, got list"),
        (
            (LOGITS, LOGITS),
            {"labels": LABELS, "hard_weight": 1.0, "ignore_index": None},
            "ignore_index should be an integer, got None",
        ),
    ],
)
def test_refuses_bad_arguments(arguments, options, message):
    with pytest.raises(InvalidArgumentError, match=message):
        kd_kl_div(*arguments, **options)


OPTIONS = (4.0, 1.0, 0.0, 0.0, -100, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (LOGITS[0], LOGITS[0], None, None, *OPTIONS),
            r"student should be \[rows, classes\].*got 1",
        ),
        ((LOGITS, LOGITS[:1], None, None, *OPTIONS), r"shape of student \[2, 3\]"),
        ((LOGITS, LOGITS.double(), None, None, *OPTIONS), "dtype of student float32, got float64"),
        ((LOGITS, LOGITS, LABELS[:1], None, *OPTIONS), r"labels should be int64 \[2\]"),
        ((LOGITS, LOGITS, LABELS + 2, None, *OPTIONS), "got 3 at row 1"),
        ((LOGITS, LOGITS, None, None, -1.0, *OPTIONS[1:]), "temperature should be .*got -1"),
        (
            (LOGITS, LOGITS, None, None, *OPTIONS[:3], 2.0, -100, 2),
            "label_smoothing should be .*got 2",
        ),
        ((LOGITS, LOGITS, None, None, *OPTIONS[:5], 3), "reduction should be .*got 3"),
        ((LOGITS, LOGITS, None, None, 4.0, 1.0, 0.5, 0.0, -100, 2), "hard_weight 0.5 needs labels"),
        ((LOGITS, LOGITS, None, None, 4.0, -1.0, 0.0, 0.0, -100, 2), "finite and not negative"),
        ((LOGITS, LOGITS, None, torch.ones(3), *OPTIONS), r"row_weights should be float32 \[2\]"),
        ((LOGITS, LOGITS, None, LABELS, *OPTIONS), "row_weights should be float32 .*got int64"),
    ],
)
def test_operator_itself_refuses_bad_arguments(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.chanprune.kd_kl_div(*arguments)


def test_operator_refuses_a_teacher_that_wants_gradients():
    teacher = LOGITS.clone().requires_grad_()
    with pytest.raises(InvalidArgumentError, match="no gradient for teacher"):
        torch.ops.chanprune.kd_kl_div(LOGITS, teacher, None, None, *OPTIONS)
