from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strided import LAYOUTS, shapes, strided, values
from torch.autograd import forward_ad

from chanprune_ext.errors import InvalidArgumentError
from chanprune_ext.ops import slice_channels, slice_channels_reference

# One dtype for every element size the copy distinguishes, and some that share one.
DTYPES = (
    torch.bool,
    torch.uint8,
    torch.bfloat16,
    torch.float16,
    torch.int32,
    torch.float32,
    torch.int64,
    torch.float64,
    torch.complex128,
)


@st.composite
def jobs(draw):
    """A tensor of any kind with index lists: none, empty, in order, repeated."""
    shape = draw(shapes(0, 5))
    tensor = strided(
        values(shape, draw(st.sampled_from(DTYPES)), draw(st.integers(0, 99))),
        draw(st.sampled_from(LAYOUTS)),
    )
    lists = []
    for dim in (0, 1):
        if dim >= len(shape) or draw(st.booleans()):
            lists.append(None)
        elif shape[dim] == 0:
            lists.append(torch.zeros(0, dtype=torch.int64))
        else:
            kept = draw(st.lists(st.integers(0, shape[dim] - 1), max_size=40))
            lists.append(torch.tensor(sorted(kept) if draw(st.booleans()) else kept).long())
    return tensor, *lists


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Raw bytes: NaN payloads and signed zeros count too."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@given(st.lists(jobs(), min_size=1, max_size=5))
def test_bit_exact_for_every_dtype_and_stride(drawn):
    tensors, rows, cols = map(list, zip(*drawn, strict=True))
    results = slice_channels(tensors, rows, cols)
    for tensor, row, col, result in zip(tensors, rows, cols, results, strict=True):
        expected = tensor
        if row is not None:
            expected = expected.index_select(0, row)
        if col is not None:
            expected = expected.index_select(1, col)
        assert result.dtype == tensor.dtype
        assert result.shape == expected.shape
        assert torch.equal(bits(result), bits(expected))
        assert result.numel() == 0 or result.data_ptr() != tensor.data_ptr()


@given(st.lists(jobs(), min_size=1, max_size=3))
def test_reference_agrees_in_values_and_strides(drawn):
    arguments = list(map(list, zip(*drawn, strict=True)))
    pairs = zip(slice_channels(*arguments), slice_channels_reference(*arguments), strict=True)
    for ours, reference in pairs:
        assert torch.equal(ours, reference)
        assert ours.stride() == reference.stride()


@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (6, 4, 1, 1), (6, 1, 3, 3), (6, 4, 2, 3, 5)])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_memory_format_is_kept(native_device, shape, last):
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    kept_format = formats[len(shape)] if last else torch.contiguous_format
    tensor = torch.empty(shape, device=native_device, memory_format=kept_format).normal_()
    cols = None if shape[1] == 1 else torch.tensor([1, 3])
    (result,) = slice_channels([tensor], [torch.tensor([0, 2, 5])], [cols])
    assert result.is_contiguous(memory_format=kept_format)
    assert result.stride() == torch.empty(result.shape, memory_format=kept_format).stride()


# One case per copy path: whole rows, long and short runs, single elements of every size, adjacent
# and scattered columns, many rows (split among threads), one huge row.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_regime(native_device, dtype):
    half = torch.arange(0, 64, 2)
    block = torch.arange(10, 50)
    tensors, rows, cols = [], [], []
    for shape, row, col in [
        ((64, 64, 3, 3), half, half),
        ((64, 64, 3, 3), half, block),
        ((64, 64, 17, 17), block, half),
        ((64, 64), half, half),
        ((64, 64), half, block),
        ((64, 64), None, half),
        ((64, 64), half, None),
        ((64, 64, 1, 1), half, half),
        ((64,), half, None),
        ((64, 5, 7), half, None),
        ((64, 64), None, None),
        ((1, 100_000), None, torch.arange(0, 100_000, 3)),
        ((70_000, 2), torch.arange(0, 70_000, 2), None),
        ((), None, None),
    ]:
        tensors.append(values(list(shape), dtype, len(tensors)).to(native_device))
        rows.append(row)
        cols.append(col)
    results = slice_channels(tensors, rows, cols)
    for result, expected in zip(
        results, slice_channels_reference(tensors, rows, cols), strict=True
    ):
        assert torch.equal(bits(result), bits(expected))


def test_int32_indices_and_repeats():
    tensor = torch.arange(12).reshape(3, 4)
    (result,) = slice_channels([tensor], [torch.tensor([2, 0, 2]).int()], [None])
    assert torch.equal(result, tensor[[2, 0, 2]])


def samples(device: torch.device, requires_grad: bool):
    def tensor(*shape):
        return torch.randn(shape, device=device, requires_grad=requires_grad)

    rows, cols = torch.tensor([0, 2, 3]), torch.tensor([1, 1, 0])
    yield [tensor(4, 3, 2, 2), tensor(4), tensor(2, 3)], [rows, rows, None], [cols, None, cols]
    yield [tensor(4, 3)], [None], [None]
    yield [tensor(4, 3)], [torch.zeros(0, dtype=torch.int64)], [cols]
    if not requires_grad:
        last = tensor(4, 3, 2, 2).contiguous(memory_format=torch.channels_last)
        yield [last, torch.arange(4, device=device)], [rows, rows], [cols, None]
        yield [tensor(2, 0, 3), tensor()], [torch.tensor([1]), None], [None, None]


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(native_device, requires_grad):
    for arguments in samples(native_device, requires_grad):
        torch.library.opcheck(torch.ops.chanprune.slice_channels, arguments)


def test_gradcheck(native_device):
    tensors = [
        torch.randn(4, 3, 2, device=native_device, dtype=torch.float64, requires_grad=True),
        torch.randn(5, device=native_device, dtype=torch.float64, requires_grad=True),
    ]
    rows = [torch.tensor([3, 0, 0]), torch.tensor([1, 4])]
    cols = [torch.tensor([2, 0]), None]
    assert torch.autograd.gradcheck(lambda *t: tuple(slice_channels(t, rows, cols)), tensors)
    assert torch.autograd.gradgradcheck(lambda *t: tuple(slice_channels(t, rows, cols)), tensors)


def test_integer_tensors_beside_differentiable_ones():
    weight = torch.randn(4, 2, requires_grad=True)
    rows = torch.tensor([1, 3])
    sliced, steps = slice_channels([weight, torch.arange(4)], [rows, rows], [None, None])
    sliced.sum().backward()
    assert steps.tolist() == [1, 3]
    assert weight.grad.tolist() == [[0, 0], [1, 1], [0, 0], [1, 1]]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_in_one_graph(native_device, backend):
    weight = torch.randn(8, 6, 3, 3, device=native_device, requires_grad=True)
    rows, cols = torch.tensor([7, 1, 2]), torch.tensor([5, 0])

    def narrow(w):
        return slice_channels([w], [rows], [cols])[0] * 2

    compiled = torch.compile(narrow, fullgraph=True, backend=backend)
    assert torch.equal(compiled(weight), narrow(weight))
    (expected,) = torch.autograd.grad(narrow(weight).sum(), weight)
    (gradient,) = torch.autograd.grad(compiled(weight).sum(), weight)
    assert torch.equal(gradient, expected)


@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_compiles_where_the_length_depends_on_data(native_device):
    mask = torch.tensor([True, False, True, True])

    def narrow(w):
        kept = mask.nonzero().squeeze(1)
        return slice_channels([w], [kept], [kept])[0] * 2

    conv = torch.randn(4, 5, 3, 3, device=native_device).to(memory_format=torch.channels_last)
    for weight in (torch.randn(4, 5, device=native_device), conv):
        compiled = torch.compile(narrow, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(weight), narrow(weight))


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 3, 3)])
def test_torch_func_transforms(native_device, shape):
    weights = torch.randn(2, *shape, device=native_device)
    rows, cols = torch.tensor([4, 1]), torch.tensor([0, 3])

    def narrow(w):
        return slice_channels([w], [rows], [cols])[0]

    batched = torch.func.vmap(narrow)(weights)
    assert torch.equal(batched, torch.stack([narrow(w) for w in weights]))
    _, tangent = torch.func.jvp(narrow, (weights[0],), (weights[1],))
    assert torch.equal(tangent, narrow(weights[1]))
    torch.func.vmap(torch.func.grad(lambda w: narrow(w).square().sum()))(weights)


def test_forward_mode_keeps_the_tangent(native_device):
    weight, direction = torch.randn(2, 4, 5, device=native_device)
    rows = torch.tensor([2, 0])
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(weight, direction)
        tangent = forward_ad.unpack_dual(slice_channels([dual], [rows], [None])[0]).tangent
    assert torch.equal(tangent, direction[[2, 0]])


INDEX = torch.tensor([0, 1])


@pytest.mark.parametrize("columns", [5, 8, 31, 32, 33, 64, 200, 1000])
@pytest.mark.parametrize("order", ["half", "sparse", "shuffled", "repeated", "near"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_gathered_columns_of_every_order(columns, order, channels_last):
    # Short vectors, windows that end at the last column, lists that leave a window at every step.
    generator = torch.Generator().manual_seed(columns)
    chosen = torch.randperm(columns, generator=generator)
    cols = {
        "half": chosen[: columns // 2].sort().values,
        "sparse": chosen[: columns // 20 + 1].sort().values,
        "shuffled": chosen,
        "repeated": chosen.repeat(2).sort().values,
        "near": torch.arange(columns).flip(0),
    }[order]
    weight = torch.randn(7, columns, 2 if channels_last else 1, 1, generator=generator)
    if channels_last:
        weight = weight.to(memory_format=torch.channels_last)
    rows = torch.tensor([6, 0, 3])
    (result,) = slice_channels([weight], [rows], [cols])
    assert torch.equal(result, weight.index_select(0, rows).index_select(1, cols))


@pytest.mark.parametrize("columns", [1, 3, 4, 5, 64, 1000])
@pytest.mark.parametrize("rows", [1, 3, 7, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_columns_of_few_rows(native_device, dtype, rows, columns):
    # Few rows gather element by element what more of them take by windows.
    cols = torch.randperm(2 * columns, generator=torch.Generator().manual_seed(rows))[:columns]
    weight = values([rows, 2 * columns], dtype, columns).to(native_device)
    results = slice_channels([weight, weight[0]], [None, cols], [cols, None])
    expected = weight.index_select(1, cols.to(native_device))
    assert torch.equal(bits(results[0]), bits(expected))
    assert torch.equal(bits(results[1]), bits(expected[0]))


@pytest.mark.parametrize("wrong", [-1, 40, -(2**63), 2**63 - 1])
@pytest.mark.parametrize("position", [0, 1, 20, 38])
def test_one_wrong_index_is_found_wherever_it_is(native_device, position, wrong):
    index = torch.arange(39)
    index[position] = wrong
    message = rf"in \[0, 40\), got {wrong} at position {position}"
    with pytest.raises(RuntimeError, match=message):
        torch.ops.chanprune.slice_channels([torch.ones(40, device=native_device)], [index], [None])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("run", [2, 3, 4, 7, 9, 25, 33, 49, 70])
def test_runs_of_every_length(dtype, run):
    weight = torch.arange(6 * 40 * run).reshape(6, 40, run).to(dtype)
    rows, cols = torch.tensor([5, 1, 2]), torch.arange(1, 40, 2)
    (result,) = slice_channels([weight], [rows], [cols])
    assert torch.equal(result, weight.index_select(0, rows).index_select(1, cols))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([torch.ones(3, 3)], [], [None]), "rows should hold one entry per tensor, got 0 for 1"),
        (([torch.ones(3, 3)], [None], [INDEX, None]), "cols should hold one entry per tensor"),
        (([torch.ones(3)], [None], [INDEX]), r"cols\[0\] selects along dim 1.*\(3,\); pass None"),
        (
            ([torch.ones(3)], [INDEX.float()], [None]),
            r"rows\[0\] should be a one-dimensional int64",
        ),
        (([torch.ones(3)], [INDEX[None]], [None]), r"rows\[0\] should be a one-dimensional int64"),
        (
            ([torch.ones(3), torch.ones(3, 2)], [None, torch.tensor([0, 3])], [None, None]),
            r"rows\[1\] should hold indices in \[0, 3\) of tensors\[1\] of shape \(3, 2\), got 3",
        ),
        (
            ([torch.ones(3, 2)], [None], [torch.tensor([1, -1])]),
            r"cols\[0\] should hold indices in \[0, 2\).*got -1",
        ),
        (([torch.ones(3)], [[0, 1]], [None]), r"rows\[0\] should be a tensor, got list"),
        (
            ([torch.ones(3, 3).to_sparse()], [INDEX], [None]),
            r"tensors\[0\] should be a dense tensor, got a torch.sparse_coo",
        ),
    ],
)
def test_refuses_bad_arguments(arguments, message):
    with pytest.raises(InvalidArgumentError, match=message):
        slice_channels(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([torch.ones(3)], [], [None]), "one entry per tensor, got 0 and 1 for 1 tensors"),
        (([torch.ones(())], [INDEX], [None]), r"rows\[0\] needs a tensor of at least one dim"),
        (
            ([torch.ones(3)], [None], [INDEX]),
            r"cols\[0\] needs a tensor of at least two dims, got 1",
        ),
        (([torch.ones(3)], [INDEX.int()], [None]), "one-dimensional int64 tensor on the CPU"),
        (([torch.ones(3)], [INDEX + 2], [None]), r"in \[0, 3\), got 3 at position 1"),
    ],
)
def test_operator_itself_refuses_bad_arguments(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.chanprune.slice_channels(*arguments)


def test_no_tensors():
    assert slice_channels([], [], []) == []


def test_meta_tensors():
    weight = torch.empty(4, 3, 2, 2, device="meta").to(memory_format=torch.channels_last)
    (result,) = slice_channels([weight], [torch.tensor([1])], [torch.tensor([0, 2])])
    assert result.device.type == "meta"
    assert result.shape == (1, 2, 2, 2)
    assert result.is_contiguous(memory_format=torch.channels_last)
