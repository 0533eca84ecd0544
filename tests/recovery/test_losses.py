"""Each loss against its formula written out in float64 numpy, its gradient, its invariances."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from chanprune_ext.errors import InvalidArgumentError
from chanprune_ext.ops import kd_kl_div
from chanprune_ext.recovery.feature_losses import (
    attention_transfer,
    channel_statistics,
    feature_mimic,
)
from chanprune_ext.recovery.logit_losses import decoupled_kd, dist, standardised


def logits(seed: int, n: int = 5, k: int = 7, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(n, k, generator=generator, dtype=torch.float64)).to(dtype)


def features(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kl(q: np.ndarray, p: np.ndarray) -> float:
    return float(np.sum(q * np.log(q / p)))


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 6),
    k=st.integers(2, 9),
    temperature=st.floats(0.5, 8),
    alpha=st.floats(0, 3),
    beta=st.floats(0, 8),
)
def test_decoupled_kd(n: int, k: int, temperature: float, alpha: float, beta: float) -> None:
    s, t = logits(1, n, k), logits(2, n, k)
    target = torch.arange(n) % k
    expected = 0.0
    for row in range(n):
        p, q = softmax(s[row].numpy() / temperature), softmax(t[row].numpy() / temperature)
        c = int(target[row])
        pair = [np.array([d[c], d.sum() - d[c]]) for d in (q, p)]
        rest = [np.delete(d, c) / np.delete(d, c).sum() for d in (q, p)]
        expected += temperature**2 * (alpha * kl(*pair) + beta * kl(*rest)) / n
    found = decoupled_kd(s, t, target, temperature, alpha=alpha, beta=beta)
    assert found.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_decoupled_kd_with_the_teachers_own_weight_is_plain_kd() -> None:
    """KL = target part + (1 - q_t) non-target part: the identity the paper starts from."""
    s, t = logits(1, 1), logits(2, 1)
    target = t.argmax(1)
    sure = float((t / 4).softmax(1)[0, target])
    found = decoupled_kd(s, t, target, 4.0, alpha=1.0, beta=1 - sure)
    torch.testing.assert_close(found, kd_kl_div(s, t, 4.0))


def test_decoupled_kd_survives_a_teacher_that_is_sure() -> None:
    s = torch.zeros(2, 10, requires_grad=True)
    t = torch.full((2, 10), -300.0)
    t[:, 3] = 300.0
    loss = decoupled_kd(s, t, torch.tensor([3, 3]), 1.0)
    loss.backward()
    assert loss.isfinite()
    assert s.grad is not None
    assert s.grad.isfinite().all()


def test_decoupled_kd_needs_two_classes() -> None:
    with pytest.raises(InvalidArgumentError, match="dkd: needs at least two classes"):
        decoupled_kd(torch.zeros(2, 1), torch.zeros(2, 1), torch.zeros(2).long())


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a, b)[0, 1])


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dist(temperature: float) -> None:
    s, t = logits(1), logits(2)
    p, q = softmax(s.numpy() / temperature), softmax(t.numpy() / temperature)
    between = np.mean([1 - correlation(a, b) for a, b in zip(p, q, strict=True)])
    within = np.mean([1 - correlation(a, b) for a, b in zip(p.T, q.T, strict=True)])
    expected = temperature**2 * (between + within)
    assert dist(s, t, temperature).item() == pytest.approx(expected, rel=1e-6)


def test_dist_of_a_single_sample_has_a_gradient_over_classes_alone() -> None:
    s = logits(1, 1).requires_grad_()
    loss = dist(s, logits(2, 1), 1.0)
    loss.backward()
    assert loss.isfinite()
    assert s.grad is not None
    assert s.grad.isfinite().all()
    assert s.grad.abs().sum() > 0


def test_standardised_logits() -> None:
    z = logits(1)
    expected = (z.numpy() - z.numpy().mean(1, keepdims=True)) / z.numpy().std(
        1, keepdims=True, ddof=1
    )
    np.testing.assert_allclose(standardised(z).numpy(), expected, rtol=1e-6)
    # What a student need not learn: shift and range.
    torch.testing.assert_close(standardised(3 * z + 5), standardised(z), rtol=1e-6, atol=1e-7)
    assert standardised(torch.ones(2, 4)).isfinite().all()


@pytest.mark.parametrize("loss", [dist, lambda s, t: decoupled_kd(s, t, t.argmax(1))])
def test_losses_on_logits_are_zero_for_the_teacher_itself_and_blind_to_a_shift(loss) -> None:
    s, t = logits(1), logits(2)
    assert loss(t, t).item() == pytest.approx(0, abs=1e-10)
    assert loss(s, t).item() > 0.1
    assert loss(s + 2, t - 3).item() == pytest.approx(loss(s, t).item(), rel=1e-9)


def test_feature_mimic() -> None:
    s, t = features(1, 3, 4, 2, 2), features(2, 3, 4, 2, 2)
    expected = float(((s - t) ** 2).sum() / (t**2).sum())
    assert feature_mimic(s, t).item() == pytest.approx(expected, rel=1e-9)
    assert feature_mimic(10 * s, 10 * t).item() == pytest.approx(expected, rel=1e-9)
    assert feature_mimic(torch.zeros_like(t), t).item() == pytest.approx(1)


def test_attention_transfer() -> None:
    s, t = features(1, 2, 3, 4, 5), features(2, 2, 6, 4, 5)
    expected = 0.0
    for a, b in zip(s.numpy(), t.numpy(), strict=True):
        maps = [(x**2).sum(0).ravel() for x in (a, b)]
        maps = [m / np.sqrt((m**2).sum()) for m in maps]
        expected += float(((maps[0] - maps[1]) ** 2).sum()) / 2
    assert attention_transfer(s, t).item() == pytest.approx(expected, rel=1e-9)
    assert attention_transfer(7 * s, t).item() == pytest.approx(expected, rel=1e-9)
    tokens = attention_transfer(s.flatten(2).mT, t.flatten(2).mT, channel_dim=2)
    assert tokens.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("weighted", [False, True])
def test_channel_statistics(weighted: bool) -> None:
    s, t = features(1, 3, 4, 2, 5), 2 + features(2, 3, 4, 2, 5)
    w = np.array([0.5, 0.0, 2.0, 1.0]) if weighted else np.ones(4)
    rows = [x.transpose(0, 1).flatten(1).numpy() for x in (s, t)]
    (ms, ds), (mt, dt) = ((r.mean(1), r.std(1)) for r in rows)
    expected = (w * ((ms - mt) ** 2 + (ds - dt) ** 2)).sum() / (w * (mt**2 + dt**2)).sum()
    given_weights = torch.from_numpy(w) if weighted else None
    assert channel_statistics(s, t, weights=given_weights).item() == pytest.approx(expected)
    moved = channel_statistics(s.movedim(1, 3), t.movedim(1, 3), 3, given_weights)
    assert moved.item() == pytest.approx(expected)
    # Only the statistics count: the same values at other positions are no difference.
    shuffled = t.flatten(2).flip(2).view_as(t)
    assert channel_statistics(shuffled, t).item() == pytest.approx(0, abs=1e-12)


def test_dead_channels_have_finite_gradients() -> None:
    s = torch.zeros(4, 3, 2, 2, requires_grad=True)
    t = torch.zeros(4, 3, 2, 2)
    t[:, 0] = 1
    total = feature_mimic(s, t) + attention_transfer(s, t) + channel_statistics(s, t)
    total.backward()
    assert total.isfinite()
    assert s.grad is not None
    assert s.grad.isfinite().all()


@pytest.mark.parametrize(
    "loss",
    [
        lambda s: decoupled_kd(s, logits(2), torch.arange(5), 2.0),
        lambda s: dist(s, logits(2), 2.0),
        lambda s: standardised(s).square().sum() + standardised(s)[0, 0],
        lambda s: feature_mimic(s.view(5, 7, 1), logits(2).view(5, 7, 1)),
        lambda s: attention_transfer(s.view(1, 5, 7), logits(2).view(1, 5, 7)),
        lambda s: channel_statistics(s.view(1, 5, 7), logits(2).view(1, 5, 7)),
    ],
)
def test_gradients(loss) -> None:
    assert torch.autograd.gradcheck(loss, (logits(1).requires_grad_(),))


@pytest.mark.parametrize("loss", [feature_mimic, attention_transfer, channel_statistics])
def test_half_features_are_compared_in_float32(loss) -> None:
    s, t = (features(i, 8, 16, 8, 8).to(torch.bfloat16) for i in (1, 2))
    found = loss(s, t)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, loss(s.float(), t.float()))
