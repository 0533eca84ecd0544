from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strided import FLOATS, LAYOUTS, shapes, strided, values
from torch.autograd import forward_ad

from chanprune_ext.errors import InvalidArgumentError
from chanprune_ext.ops import channel_norms, channel_norms_reference

NORMS = [1.0, 2.0, math.inf]
# Relative to a float64 computation. Half inputs are exact in float32, so they get its bound too.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-6, torch.bfloat16: 2e-6, torch.float64: 1e-13}


def exact(weight: torch.Tensor, dim: int, p: float) -> torch.Tensor:
    """The definition, one channel after the other, in float64."""
    norms = []
    for channel in weight.double().unbind(dim):
        flat = channel.reshape(-1)
        norms.append(
            torch.linalg.vector_norm(flat, p) if flat.numel() else torch.tensor(0.0).double()
        )
    return torch.stack(norms) if norms else torch.zeros(0, dtype=torch.float64)


@given(
    weights=st.lists(
        st.tuples(
            shapes(1, 5),
            st.sampled_from(FLOATS),
            st.sampled_from(LAYOUTS),
            st.integers(-5, 4),
        ),
        min_size=1,
        max_size=4,
    ),
    p=st.sampled_from(NORMS),
)
def test_equals_definition(weights, p):
    drawn = [
        strided(values(shape, dtype, seed), layout)
        for seed, (shape, dtype, layout, _) in enumerate(weights)
    ]
    dims = [dim % len(shape) - (len(shape) if dim < 0 else 0) for shape, _, _, dim in weights]
    for weight, dim, norm in zip(drawn, dims, channel_norms(drawn, dims, p), strict=True):
        expected = exact(weight, dim, p)
        assert norm.dtype == (torch.float64 if weight.dtype == torch.float64 else torch.float32)
        assert norm.is_contiguous()
        torch.testing.assert_close(norm.double(), expected, rtol=TOLERANCE[weight.dtype], atol=0)


# One shape per code path: short rows, long rows, several of them in a unit, split rows, split outer
# steps, columns with and without a remainder, depthwise, one channel, one element.
REGIMES = [
    ((64, 32, 3, 3), 0),
    ((64, 32, 3, 3), 1),
    ((9, 5000), 0),
    ((3, 70_001), 0),
    ((1, 140_000), 0),
    ((300, 40, 600), 1),
    ((2500, 1030), 1),
    ((513, 130, 5), 1),
    ((96, 1, 3, 3), 0),
    ((96, 1, 3, 3), 1),
    ((1, 1), 0),
    ((1000,), 0),
]


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_regime(native_device, dtype, p):
    weights = [torch.randn(shape, device=native_device).to(dtype) for shape, _ in REGIMES]
    dims = [dim for _, dim in REGIMES]
    for weight, dim, norm in zip(weights, dims, channel_norms(weights, dims, p), strict=True):
        others = [d for d in range(weight.dim()) if d != dim]
        expected = (
            torch.linalg.vector_norm(weight.double(), p, dim=others)
            if others
            else weight.double().abs()
        )
        torch.testing.assert_close(norm.double(), expected, rtol=TOLERANCE[dtype], atol=0)


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rows_of_every_length(native_device, dtype, p):
    # More rows than are folded together, up to more elements than a row's loops take in one step;
    # beyond each row lies something that must not be read into it, or nothing.
    rows, longest = 21, 70
    lengths = range(1, longest + 1)
    packed = [torch.randn(rows, n, device=native_device).to(dtype) for n in lengths]
    wide = torch.full((rows, longest + 9), math.nan, device=native_device, dtype=dtype)
    sliced = []
    for weight in packed:
        padded = wide.clone()
        padded[:, : weight.shape[1]] = weight
        sliced.append(padded[:, : weight.shape[1]])
    for weights in (packed, sliced):
        for weight, norm in zip(weights, channel_norms(weights, [0] * longest, p), strict=True):
            expected = torch.linalg.vector_norm(weight.double(), p, dim=1)
            torch.testing.assert_close(norm.double(), expected, rtol=TOLERANCE[dtype], atol=0)


def views():
    """Weights whose channels lie apart, repeat or come in runs, and the channel dim."""
    matrix = torch.randn(130, 300)
    conv = torch.randn(70, 40, 3, 3)
    last = conv.to(memory_format=torch.channels_last)
    yield matrix[:, ::2], 1  # gaps within a cache line
    yield matrix[:, ::2], 0
    yield matrix[:, ::100], 1  # and gaps of several
    yield matrix.t()[::3], 0
    yield matrix[:1].expand(130, 300), 0
    yield matrix[:, :1].expand(130, 300), 1
    yield matrix[:, :1].expand(130, 300), 0
    yield conv[:, :, 1, 1], 1
    yield conv[:, :, 1], 1
    yield conv[:, :1].expand(70, 40, 3, 3), 1
    yield last[:, ::2], 1
    yield last[:, :33], 0
    yield last[:, :33], 1
    yield last[:, :33], 2
    yield conv[0, 0, 0].repeat(50).unfold(0, 5, 1), 0  # windows that overlap
    yield matrix[0].unfold(0, 40, 2), 1
    yield matrix[0, ::2], 0


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_views_of_every_kind(native_device, dtype, p):
    for view, dim in views():
        whole = torch.full((view.untyped_storage().nbytes() // 4,), math.nan)
        # All that lies between the elements is NaN, which must not be counted.
        weight = whole.as_strided(view.shape, view.stride(), view.storage_offset())
        weight.copy_(view) if 0 not in view.stride() else weight.fill_(1.5)
        strides, offset = weight.stride(), weight.storage_offset()
        moved = whole.to(native_device, dtype).as_strided(weight.shape, strides, offset)
        (norm,) = channel_norms([moved], [dim], p)
        expected = exact(moved, dim, p)
        torch.testing.assert_close(norm.double(), expected, rtol=TOLERANCE[dtype], atol=0)


def test_sliced_channels_last_weights_are_not_copied():
    weight = torch.randn(256, 256, 3, 3).to(memory_format=torch.channels_last)[:, :200]
    with torch.profiler.profile(profile_memory=True) as profile:
        channel_norms([weight], [0])
    allocated = sum(event.self_cpu_memory_usage for event in profile.events())
    assert allocated < weight.numel() * weight.element_size() / 10


def test_results_outlive_each_other():
    weights = [torch.full((size, 2), float(size)) for size in range(1, 40)]
    norms = channel_norms(weights, [0] * 39)
    kept = norms[20]
    for norm in norms[:20]:  # each has a storage of its own
        norm.zero_()
    del norms, norm
    channel_norms(weights, [0] * 39)
    assert torch.equal(kept, torch.full((21,), 42.0))


@pytest.mark.parametrize("p", NORMS)
def test_reference_agrees(p):
    weights = [torch.randn(8, 3, 3, 3), torch.randn(5), torch.zeros(4, 0)]
    dims = [1, 0, 0]
    for ours, reference in zip(
        channel_norms(weights, dims, p), channel_norms_reference(weights, dims, p), strict=True
    ):
        torch.testing.assert_close(ours, reference)


def test_channels_last_weights_are_not_copied():
    # The copy of a weight of this size would be the peak of the call's memory.
    weight = torch.randn(256, 256, 3, 3).to(memory_format=torch.channels_last)
    with torch.profiler.profile(profile_memory=True) as profile:
        channel_norms([weight, weight], [0, 1])
    allocated = sum(event.self_cpu_memory_usage for event in profile.events())
    assert allocated < weight.numel() * weight.element_size() / 10


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_inf_reach_their_channel_only(native_device, bad, dim, p):
    weight = torch.ones(40, 40, 3, 3, device=native_device)
    weight[7, 7, 1, 1] = bad
    (norm,) = channel_norms([weight], [dim], p)
    assert norm[7].isnan() if math.isnan(bad) else norm[7].isinf()
    assert norm[torch.arange(40) != 7].isfinite().all()


def test_half_scores_do_not_tie():
    weight = torch.randn(512, 4096).bfloat16()
    (norm,) = channel_norms([weight], [0])
    assert norm.unique().numel() > 500


@pytest.mark.parametrize("threads", [1, 2])
def test_result_does_not_depend_on_threads(threads):
    weights = [torch.randn(64, 300, 3, 3), torch.randn(3, 200_000), torch.randn(3000, 70)]
    before = torch.get_num_threads()
    once = channel_norms(weights, [1, 0, 1])
    try:
        torch.set_num_threads(threads)
        again = channel_norms(weights, [1, 0, 1])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def samples(device: torch.device, requires_grad: bool, dtype: torch.dtype):
    weights = [
        torch.randn(4, 3, 3, 3, device=device, dtype=dtype),
        torch.randn(5, 7, device=device, dtype=dtype),
        torch.randn(6, device=device, dtype=dtype),
    ]
    for p in NORMS:
        yield [w.requires_grad_(requires_grad) for w in weights], [0, 1, -1], p
    if not requires_grad:
        yield [torch.randn(0, 3, device=device), torch.randn(3, 0, device=device)], [0, 0], 1.0
        yield [weights[0].to(memory_format=torch.channels_last)], [1], 2.0


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(native_device, requires_grad):
    for arguments in samples(native_device, requires_grad, torch.float32):
        torch.library.opcheck(torch.ops.chanprune.channel_norms, arguments)


@pytest.mark.parametrize("p", NORMS)
def test_gradcheck(native_device, p):
    weights = [
        torch.randn(3, 2, 2, device=native_device, dtype=torch.float64),
        torch.randn(2, 5, 3, device=native_device, dtype=torch.float64).transpose(0, 1),
    ]
    for weight in weights:
        weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda *w: tuple(channel_norms(w, [0, 1], p)), weights)
    assert torch.autograd.gradgradcheck(lambda *w: tuple(channel_norms(w, [0, 1], p)), weights)


def test_gradient_is_zero_at_a_zero_norm():
    weight = torch.zeros(2, 3, requires_grad=True)
    (norm,) = channel_norms([weight], [0], 2.0)
    norm.sum().backward()
    assert torch.equal(weight.grad, torch.zeros(2, 3))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_in_one_graph(native_device, backend):
    weights = [torch.randn(8, 4, 3, 3, device=native_device, requires_grad=True)]

    def score(w):
        return channel_norms([w, w], [0, 1], 1.0)[0].sum()

    compiled = torch.compile(score, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(weights[0]), score(weights[0]))
    (expected,) = torch.autograd.grad(score(weights[0]), weights)
    (gradient,) = torch.autograd.grad(compiled(weights[0]), weights)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([torch.ones(2, 2)], [0, 1], 1.0), "one dim per weight, got 2 for 1 weights"),
        (([torch.ones(2, 2)], [2], 1.0), r"dims\[0\] should be a dim of weights\[0\].*got 2"),
        (([torch.ones(())], [0], 1.0), r"dims\[0\] should be a dim"),
        (([torch.ones(2, 2)], [0], 3.0), "p should be 1, 2 or math.inf, got 3"),
        (([torch.ones(2, dtype=torch.int64)], [0], 1.0), r"weights\[0\] should be float16.*int64"),
        (([torch.ones(2, 2).to_sparse()], [0], 1.0), r"weights\[0\] should be a dense.*sparse_coo"),
        (
            ([torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged)], [0], 1.0),
            r"weights\[0\] should be a dense tensor, got a nested one",
        ),
        (([torch.ones([1] * 65)], [0], 1.0), r"weights\[0\] should have at most 64 dims, got 65"),
    ],
)
def test_refuses_bad_arguments(arguments, message):
    with pytest.raises(InvalidArgumentError, match=message):
        channel_norms(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([torch.ones(2, 2)], [0, 1], 1.0), "one dim per weight"),
        (([torch.ones(2, 2)], [-3], 1.0), r"dims\[0\] should be in \[-2, 2\), got -3"),
        (([torch.ones(2, 2)], [0], 3.0), "p should be 1, 2 or inf, got 3"),
        (([torch.ones(2).int()], [0], 1.0), "should be float16.*got int32"),
    ],
)
def test_operator_itself_refuses_bad_arguments(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.chanprune.channel_norms(*arguments)


def test_no_weights():
    assert channel_norms([], []) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_half_value_is_read_exactly(native_device, dtype):
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    weight = patterns.view(dtype).to(native_device)
    # As single elements (columns) and as rows of 128 (lanes), subnormals, Inf and NaN included.
    (single,) = channel_norms([weight], [0], math.inf)
    torch.testing.assert_close(single, weight.float().abs(), rtol=0, atol=0, equal_nan=True)
    (rows,) = channel_norms([weight.view(512, 128)], [0], math.inf)
    expected = weight.view(512, 128).float().abs().amax(1)
    torch.testing.assert_close(rows, expected, rtol=0, atol=0, equal_nan=True)


def test_half_subnormals_count_where_those_of_float32_are_flushed():
    # As rows of 128 (lanes) and as columns.
    weight = torch.arange(1, 2**10, dtype=torch.int16).view(torch.float16).repeat(128, 1).t()
    expected = weight[:, 0].float() * 128
    torch.set_flush_denormal(True)
    try:
        (rows,) = channel_norms([weight.contiguous()], [0])
        (columns,) = channel_norms([weight], [0])
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(rows, expected)
    assert torch.equal(columns, expected)


def test_forward_mode_keeps_the_tangent(native_device):
    weight, direction = torch.randn(2, 4, 5, device=native_device)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(weight, direction)
        tangent = forward_ad.unpack_dual(channel_norms([dual], [0])[0]).tangent
    torch.testing.assert_close(tangent, (weight.sign() * direction).sum(1))


def test_meta_tensors():
    (norm,) = channel_norms([torch.empty(4, 3, device="meta", dtype=torch.half)], [1])
    assert norm.device.type == "meta"
    assert norm.shape == (3,)
    assert norm.dtype == torch.float32


# Columns of which so many partial values are left that several shares of channels are joined.
@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("shape", [(300, 700, 3, 3), (130, 3000), (70, 1025, 1, 2)])
def test_partial_values_of_many_channels(native_device, shape, p):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(native_device)
    (norms,) = channel_norms([weight], [1], p)
    expected = exact(weight.cpu(), 1, p)
    torch.testing.assert_close(norms.cpu().double(), expected, rtol=TOLERANCE[weight.dtype], atol=0)
