from __future__ import annotations

import importlib
import importlib.util
import itertools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample

from chanprune_ext.analysis import labels as labels_module
from chanprune_ext.analysis.labels import MAX_SLOTS, ReferenceLabelStore
from chanprune_ext.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

try:
    NativeLabelStore = importlib.import_module("chanprune_ext._coupling").LabelStore
except ImportError:
    NativeLabelStore = None

needs_native = pytest.mark.skipif(
    NativeLabelStore is None, reason="the module chanprune_ext._coupling is not built"
)
STORES = [
    pytest.param(ReferenceLabelStore, id="reference"),
    pytest.param(NativeLabelStore, id="native", marks=needs_native),
]
Store = Any
Op = tuple[Any, ...]
each_store = pytest.mark.parametrize("store", STORES)

# At most this many free variables are enumerated (all 2^12 assignments).
MAX_FREE = 12
SHAPES = [(4,), (2, 2), (2, 3), (3, 2), (1, 4), (2, 1, 2), (2, 2, 2)]


@pytest.fixture(name="new")
def make_new(store: Callable[[], Store]) -> Callable[[], Store]:
    return store


def row(first: int, n: int) -> np.ndarray:
    return np.arange(first, first + n, dtype=np.int64)[None]


def fresh(store: Store, n: int) -> np.ndarray:
    return row(store.fresh(n), n)


# ------------------------------------------------------------------------- the oracle
#
# Each operation demands equations "OR of these labels == OR of those". The oracle knows nothing of
# unions or definitions: it takes every assignment the store still allows and checks every equation
# demanded so far, also those of the first operation after the last one.

Equation = tuple[list[int], list[int]]


def allowed_values(store: Store) -> np.ndarray:
    """Truth of every label (columns) under every assignment the store allows (rows)."""
    expansion = store.resolve(np.arange(store.size))
    free = np.unique(expansion[expansion != 0])
    if len(free) > MAX_FREE:
        raise OverflowError
    assignments = np.arange(2 ** len(free))[:, None] >> np.arange(len(free)) & 1
    values = np.zeros((len(assignments), store.size), dtype=bool)
    for slot in expansion:
        live = np.flatnonzero(slot)
        values[:, live] |= assignments[:, np.searchsorted(free, slot[live])] == 1
    return values


def violations(store: Store, equations: list[Equation]) -> list[Equation]:
    values = allowed_values(store)
    return [
        (left, right)
        for left, right in equations
        if (values[:, left].any(axis=1) != values[:, right].any(axis=1)).any()
    ]


def split_equations(slots: np.ndarray, sizes: tuple[int, ...], dims: list[Any]) -> list[Equation]:
    equations = []
    for position, coords in enumerate(np.ndindex(*sizes)):
        parts = [label for dim, i in zip(dims, coords, strict=True) for label in dim[:, i].tolist()]
        equations.append((slots[:, position].tolist(), parts))
    return equations


def columns_equations(a: np.ndarray, b: np.ndarray) -> list[Equation]:
    return [(a[:, i].tolist(), b[:, i].tolist()) for i in range(a.shape[1])]


def perform(store: Store, op: Op) -> tuple[Any, list[Equation]]:
    """Run one operation; return what it returned and the equations it must establish."""
    name, *args = op
    grids = [np.asarray(a) % store.size for a in args if isinstance(a, np.ndarray)]
    reason = 7
    if name == "unify":
        store.unify(*grids, reason)
        return None, columns_equations(*grids)
    if name == "union":
        store.union(grids[0][0], grids[1][0], reason)
        return None, columns_equations(grids[0][:1], grids[1][:1])
    if name == "freeze":
        store.freeze(grids[0], reason)
        return None, [([label], []) for label in grids[0].ravel().tolist()]
    if name == "tie":
        store.tie(grids[0], reason)
        return None, columns_equations(grids[0], np.roll(grids[0], 1, axis=1))
    if name == "flag":
        store.set_flag(grids[0], args[1])
        return None, []
    sizes = args[-1]
    slots = store.merge(*grids) if name == "merge_split" else grids[0]
    dims = store.split(slots, list(sizes), reason)
    return dims, split_equations(slots, sizes, dims)


def grid(rows: st.SearchStrategy[int], n: int) -> st.SearchStrategy[np.ndarray]:
    label = st.one_of(st.integers(0, 9), st.integers(0, 40))
    flat = rows.flatmap(lambda k: st.lists(label, min_size=k * n, max_size=k * n))
    return flat.map(lambda values: np.asarray(values, dtype=np.int64).reshape(-1, n))


@st.composite
def operation(draw: st.DrawFn) -> Op:
    name = draw(
        st.sampled_from(
            ["unify", "unify", "union", "freeze", "tie", "flag", "split", "merge_split"]
        )
    )
    slots = st.integers(1, 3)
    if name in ("unify", "union"):
        n = draw(st.integers(1, 4))
        return name, draw(grid(slots, n)), draw(grid(slots, n))
    if name == "merge_split":
        n1, n2 = draw(st.sampled_from([(2, 2), (2, 3), (3, 2), (4, 2)]))
        target = draw(st.sampled_from([s for s in SHAPES if math.prod(s) == n1 * n2] or [(n1, n2)]))
        return name, draw(grid(slots, n1)), draw(grid(slots, n2)), target
    if name == "split":
        sizes = draw(st.sampled_from(SHAPES))
        return name, draw(grid(slots, math.prod(sizes))), sizes
    labels = draw(grid(st.integers(1, 2), draw(st.integers(1, 3))))
    if name == "flag":
        return name, labels, draw(st.sampled_from([1, 2, 128]))
    return name, labels


programs = st.tuples(st.integers(2, 10), st.lists(operation(), min_size=1, max_size=7))
quick = settings(
    max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)


def broken_equations(store: Store, program: tuple[int, list[Op]]) -> list[Equation]:
    """Run a program, checking after every operation; return what does not hold."""
    base, ops = program
    store.fresh(base // 2)
    store.fresh(base - base // 2)
    equations: list[Equation] = []
    for op in ops:
        equations += perform(store, op)[1]
        try:
            if bad := violations(store, equations):
                return bad
        except OverflowError:
            break
    return []


@each_store
@quick
@given(program=programs)
def test_every_equation_holds_for_every_assignment(
    store: Callable[[], Store], program: tuple[int, list[Op]]
) -> None:
    assert broken_equations(store(), program) == []


@each_store
@quick
@given(program=programs)
def test_queries_agree_with_the_assignments(
    store: Callable[[], Store], program: tuple[int, list[Op]]
) -> None:
    made = store()
    made.fresh(program[0])
    for op in program[1]:
        perform(made, op)
    try:
        values = allowed_values(made)
    except OverflowError:
        return
    everything = np.arange(made.size)
    np.testing.assert_array_equal(made.frozen(everything), ~values.any(axis=0))
    for label, (root, axis) in enumerate(
        zip(made.find(everything), made.axis(everything), strict=True)
    ):
        np.testing.assert_array_equal(values[:, label], values[:, root])
        assert axis == made.axis(root)
        assert (made.reason(label) == 7) == (label != 0 and not values[:, label].any())


class _UnionForgets(ReferenceLabelStore):
    def _join(self, a: int, b: int) -> None:
        if (a + b) % 2 == 0:
            super()._join(a, b)


class _DefinitionLosesPart(ReferenceLabelStore):
    def _define(self, leaf: int, parts: Any) -> None:
        super()._define(leaf, parts[:-1])


class _SharedLabelsExcuse(ReferenceLabelStore):
    def _equate(self, a: Any, b: Any, reason: int) -> None:
        if not set(self._live(a)) & set(self._live(b)):
            super()._equate(a, b, reason)


class _RepeatsIgnored(ReferenceLabelStore):
    def union(self, a: Any, b: Any, reason: int) -> None:
        if not isinstance(a, list):  # as called for a class that repeats within a split
            super().union(a, b, reason)


class _HolesIgnored(ReferenceLabelStore):
    def _factor(self, mixed: Any, *args: Any) -> None:
        freeze, self.freeze = self.freeze, lambda *_: None  # type: ignore[method-assign]
        super()._factor(mixed, *args)
        self.freeze = freeze  # type: ignore[method-assign]


class _DefinitionsNotExpanded(ReferenceLabelStore):
    def _live(self, labels: Any) -> list[int]:
        roots = dict.fromkeys(self._root(label) for label in labels)
        return [root for root in roots if not self._frozen[root]]


@pytest.mark.parametrize(
    "broken",
    [
        _UnionForgets,
        _DefinitionLosesPart,
        _SharedLabelsExcuse,
        _RepeatsIgnored,
        _HolesIgnored,
        _DefinitionsNotExpanded,
    ],
)
def test_the_oracle_catches_a_wrong_store(broken: type[ReferenceLabelStore]) -> None:
    search = settings(
        max_examples=3000, deadline=None, derandomize=True, phases=[Phase.generate], database=None
    )
    try:
        find(programs, lambda program: bool(broken_equations(broken(), program)), settings=search)
    except NoSuchExample:
        pytest.fail(f"no random program showed that {broken.__name__} is wrong")


@needs_native
@quick
@given(program=programs)
def test_native_equals_reference(program: tuple[int, list[Op]]) -> None:
    base, ops = program
    stores = [ReferenceLabelStore(), NativeLabelStore()]
    for made in stores:
        assert made.fresh(base) == 1
    slots = []
    for op in ops:
        results = [perform(made, op)[0] for made in stores]
        if results[0] is not None:
            for expected, got in zip(*results, strict=True):
                np.testing.assert_array_equal(got, expected)
            slots += results[0]
        slots += [arg % base for arg in op if isinstance(arg, np.ndarray)]
    reference, native = stores
    assert native.size == reference.size
    everything = np.arange(reference.size)
    for query in ("find", "frozen", "axis", "flags", "resolve", "occurrences"):
        expected, got = (getattr(made, query)(everything) for made in stores)
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(got, expected, err_msg=query)
    for label in everything.tolist():
        assert native.reason(label) == reference.reason(label)
    for expected, got in zip(*(made.signatures(slots) for made in stores), strict=True):
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(got, expected)


# ------------------------------------------------------- networks' patterns stay prunable


@each_store
def test_residual_chain_is_one_free_group(new: Callable[[], Store]) -> None:
    store = new()
    dims = [fresh(store, 16) for _ in range(10)]
    for a, b in itertools.pairwise(dims):
        store.unify(a, b, 1)
    assert not store.frozen(dims[-1]).any()
    roots, hashes = store.signatures(dims)
    np.testing.assert_array_equal(roots, dims[0][0])
    assert len(set(hashes.tolist())) == 1


@each_store
def test_reshape_makes_heads_and_head_dims_removable(new: Callable[[], Store]) -> None:
    store = new()
    channels = fresh(store, 6)
    heads, dims = store.split(channels, [2, 3], 1)
    assert heads.shape == (1, 2)
    assert dims.shape == (1, 3)
    assert not store.frozen(channels).any()
    np.testing.assert_array_equal(store.resolve(channels), store.merge(heads, dims))
    store.freeze(dims, 1)
    np.testing.assert_array_equal(store.resolve(channels), np.repeat(heads, 3, axis=1))


@each_store
def test_square_reshape_gives_two_groups(new: Callable[[], Store]) -> None:
    store = new()
    channels = fresh(store, 16)
    heads, dims = store.split(channels, [4, 4], 1)
    roots, hashes = store.signatures([channels])
    assert set(roots.tolist()) == set(heads.ravel().tolist() + dims.ravel().tolist())
    by_root = dict(zip(roots.tolist(), hashes.tolist(), strict=True))
    assert len({by_root[label] for label in heads.ravel().tolist()}) == 1
    assert len({by_root[label] for label in dims.ravel().tolist()}) == 1
    assert len(set(by_root.values())) == 2


@each_store
def test_channel_shuffle_reaches_the_right_channel(new: Callable[[], Store]) -> None:
    store = new()
    out, following = fresh(store, 6), fresh(store, 6)
    groups, inner = store.split(out, [2, 3], 1)
    shuffled = store.merge(inner, groups)
    store.unify(shuffled, following, 1)
    expected = store.resolve(out)[:, np.arange(6).reshape(2, 3).T.ravel()]
    got = store.resolve(following)
    np.testing.assert_array_equal(np.sort(got, axis=0), np.sort(expected, axis=0))
    assert not store.frozen(out).any()


@each_store
def test_two_shuffles_in_a_row_move_labels_exactly(new: Callable[[], Store]) -> None:
    store = new()
    channels = fresh(store, 6)
    moved = channels
    for _ in range(2):
        groups, inner = store.split(moved, [2, 3], 1)
        moved = store.merge(inner, groups)
    order = np.arange(6).reshape(2, 3).T.ravel()
    expected = store.resolve(channels)[:, order[order]]
    np.testing.assert_array_equal(np.sort(store.resolve(moved), 0), np.sort(expected, 0))


@each_store
def test_flatten_couples_a_channel_to_its_49_features(new: Callable[[], Store]) -> None:
    store = new()
    channels, features = fresh(store, 8), fresh(store, 8 * 49)
    pixels = np.zeros((0, 49), dtype=np.int64)
    store.unify(store.merge(channels, pixels), features, 1)
    np.testing.assert_array_equal(store.resolve(features), np.repeat(channels, 49, axis=1))
    back, empty = store.split(features, [8, 49], 1)
    np.testing.assert_array_equal(back, channels)
    assert empty.shape == (0, 49)
    pairs = store.occurrences(features)
    np.testing.assert_array_equal(pairs[:, 0], np.repeat(channels, 49))
    np.testing.assert_array_equal(pairs[:, 1], np.arange(8 * 49))


@each_store
def test_pixel_shuffle_keeps_its_channels_prunable(new: Callable[[], Store]) -> None:
    store = new()
    out = fresh(store, 12)
    channels, up, across = store.split(out, [3, 2, 2], 1)
    for factor in (up, across):  # each meets a spatial dim of the next convolution
        store.freeze(store.merge(np.zeros((0, 5), dtype=np.int64), factor), 2)
    np.testing.assert_array_equal(store.resolve(out), np.repeat(channels, 4, axis=1))
    assert store.reason(int(up[0, 1])) == 2


@each_store
def test_grouped_query_heads_follow_key_value_heads(new: Callable[[], Store]) -> None:
    store = new()
    queries, keys, repeats = fresh(store, 6), fresh(store, 2), fresh(store, 3)
    store.unify(queries, store.merge(keys, repeats), 1)
    assert not store.frozen(queries).any()
    store.freeze(queries[:, :1], 5)
    assert store.frozen(keys).tolist() == [[True, False]]
    assert store.frozen(repeats).tolist() == [[True, False, False]]
    assert store.reason(int(queries[0, 0])) == 5
    assert store.frozen(queries).tolist() == [[True] + [False] * 5]


@each_store
def test_grouped_convolution_ties_its_groups(new: Callable[[], Store]) -> None:
    store = new()
    inputs, outputs = fresh(store, 12), fresh(store, 8)
    in_groups, in_each = store.split(inputs, [4, 3], 1)
    out_groups, out_each = store.split(outputs, [4, 2], 1)
    store.unify(in_groups, out_groups, 1)
    group, each = store.resolve(in_groups), store.resolve(in_each)
    np.testing.assert_array_equal(store.resolve(outputs)[0], np.repeat(group[0], 2))
    np.testing.assert_array_equal(store.resolve(inputs), store.merge(group, each))
    assert not store.frozen(out_each).any()


@each_store
def test_heads_split_further_take_their_head_dims_along(new: Callable[[], Store]) -> None:
    store = new()
    channels = fresh(store, 24)
    heads, dims = store.split(channels, [6, 4], 1)
    outer, rest = store.split(channels, [2, 12], 1)
    assert not store.frozen(channels).any()
    inner = store.resolve(rest)
    assert inner.shape == (2, 12)
    kept = store.resolve(heads)
    np.testing.assert_array_equal(kept[0], np.repeat(outer[0], 3))
    assert len(np.unique(kept[1])) == 3
    assert set(np.unique(inner)) == set(np.unique(kept[1])) | set(dims[0].tolist())


@each_store
def test_one_frozen_head_leaves_the_others(new: Callable[[], Store]) -> None:
    store = new()
    channels = fresh(store, 6)
    heads, dims = store.split(channels, [3, 2], 1)
    store.freeze(heads[:, 1], 4)
    again = store.split(channels, [3, 2], 1)
    np.testing.assert_array_equal(again[0], np.where([[1, 0, 1]], heads, 0))
    np.testing.assert_array_equal(again[1], dims)
    assert store.frozen(heads).tolist() == [[False, True, False]]


@each_store
def test_padded_channels_pass_through_a_reshape(new: Callable[[], Store]) -> None:
    store = new()
    channels = np.concatenate([np.zeros((1, 2), np.int64), fresh(store, 3)], axis=1)
    flat = store.merge(channels, np.zeros((0, 4), np.int64))
    back = store.split(flat, [5, 4], 1)
    np.testing.assert_array_equal(back[0], channels)
    assert store.frozen(channels).tolist() == [[True, True, False, False, False]]


# ------------------------------------------------------------------- single rules of the algebra


@each_store
def test_unify_against_nothing_freezes_and_names_the_cause(new: Callable[[], Store]) -> None:
    store = new()
    a, b, c = (fresh(store, 2) for _ in range(3))
    store.freeze(a[:, :1], 3)
    store.unify(a, b, 8)
    assert store.frozen(b).tolist() == [[True, False]]
    assert store.reason(int(b[0, 0])) == 3
    store.unify(np.zeros((1, 2), np.int64), c, 8)
    assert [store.reason(int(label)) for label in c[0]] == [8, 8]
    store.freeze(c, 9)
    assert store.reason(int(c[0, 0])) == 8


@each_store
def test_unify_with_shared_labels_freezes_the_rest(new: Callable[[], Store]) -> None:
    store = new()
    shared, extra = fresh(store, 1), fresh(store, 1)
    store.unify(shared, np.concatenate([shared, extra]), 6)
    assert store.frozen(np.concatenate([shared, extra])).ravel().tolist() == [False, True]
    assert store.reason(int(extra[0, 0])) == 6


@each_store
def test_too_many_parts_are_tied(new: Callable[[], Store]) -> None:
    store = new()
    one, parts = fresh(store, 2), fresh(store, 2 * MAX_SLOTS + 1)
    store.unify(one[:, :1], parts[0, :MAX_SLOTS, None], 1)
    assert len(store.resolve(one[:, :1])) == MAX_SLOTS
    store.unify(one[:, 1:], parts[0, MAX_SLOTS:, None], 1)
    assert len(np.unique(store.find(np.append(parts[0, MAX_SLOTS:], one[0, 1])))) == 1
    assert not store.frozen(parts).any()


@each_store
def test_union_with_a_defined_class(new: Callable[[], Store]) -> None:
    store = new()
    whole, other, parts = fresh(store, 1), fresh(store, 1), fresh(store, 2)
    store.unify(whole, parts.T, 1)
    store.union(other[0], whole[0], 1)
    np.testing.assert_array_equal(store.resolve(other), parts.T)
    store.union(other[0], parts[0, :1], 1)
    assert store.frozen(parts[0]).tolist() == [False, True]


@each_store
def test_tie_covers_definitions_and_columns_without_label(new: Callable[[], Store]) -> None:
    store = new()
    heads = store.split(fresh(store, 4), [2, 2], 1)
    store.tie(np.asarray([1, 4]), 1)
    assert len(np.unique(store.find(np.concatenate(heads)))) == 1
    more = fresh(store, 2)
    store.tie(np.concatenate([more, np.zeros((1, 1), np.int64)], axis=1), 9)
    assert [store.reason(int(label)) for label in more[0]] == [9, 9]


@each_store
def test_split_of_a_tied_row_freezes_it(new: Callable[[], Store]) -> None:
    store = new()
    channels = fresh(store, 6)
    store.tie(channels, 1)
    one = store.split(channels, [1, 6], 2)
    assert one[0].shape == (0, 1)
    np.testing.assert_array_equal(one[1], np.full((1, 6), channels[0, 0]))
    assert not store.frozen(channels).any()
    assert [dim.shape for dim in store.split(channels, [2, 3], 2)] == [(0, 2), (0, 3)]
    assert store.reason(int(channels[0, 3])) == 2


@each_store
def test_flags_follow_unions_and_reach_parts(new: Callable[[], Store]) -> None:
    store = new()
    a, b = fresh(store, 4), fresh(store, 4)
    store.set_flag(a[:, :2], 1)
    store.set_flag(b[:, 1:], 4)
    store.unify(a, b, 1)
    assert store.flags(b).tolist() == [[1, 5, 4, 4]]
    first, second = store.split(a, [2, 2], 1)
    assert store.flags(first).tolist() == [[5, 4]]
    assert store.flags(second).tolist() == [[5, 5]]
    store.set_flag(b[:, 0], 128)
    assert store.flags(np.stack([first[0], second[0]])).tolist() == [[133, 4], [133, 5]]
    assert store.flags(0) == 0


@each_store
def test_axes_unite_with_their_labels_only(new: Callable[[], Store]) -> None:
    store = new()
    a, b, c, d = (fresh(store, 3) for _ in range(4))
    store.unify(a[:, :1], b[:, 2:], 1)
    store.unify(c[:, :1], np.asarray([[d[0, 0]], [d[0, 1]]]), 1)
    axes = [set(store.axis(dim).ravel().tolist()) for dim in (a, b, c, d)]
    assert axes[0] == axes[1]
    assert all(len(axis) == 1 for axis in axes)
    assert len(set.union(*axes)) == 3
    assert store.axis(0) == 0


@each_store
def test_signatures_count_indices(new: Callable[[], Store]) -> None:
    store = new()
    a = fresh(store, 3)
    once, twice = a, np.concatenate([a, a[:, :1]], axis=1)
    roots, hashes = store.signatures([once, twice])
    np.testing.assert_array_equal(roots, a[0])
    assert hashes[1] == hashes[2]
    assert hashes[0] != hashes[1]
    assert store.signatures([])[0].shape == (0,)
    np.testing.assert_array_equal(store.signatures([once, twice])[1], hashes)


@each_store
def test_long_chains_of_definitions_resolve(new: Callable[[], Store]) -> None:
    store = new()
    first = top = fresh(store, 1)
    for _ in range(3000):
        parts = fresh(store, 2)
        store.unify(top, parts.T, 1)
        store.freeze(parts[:, 1:], 2)
        top = parts[:, :1]
    np.testing.assert_array_equal(store.resolve(first), top)
    doubled = fresh(store, 1)
    level = doubled
    for _ in range(60):  # 2^60 paths lead to the two leaves at the end
        pair = fresh(store, 2)
        for label in np.unique(level):
            store.unify(np.asarray([[label]]), pair.T, 1)
        level = pair
    np.testing.assert_array_equal(store.resolve(doubled), level.T)


# ---------------------------------------------------------------------- arrays and bad input


@each_store
def test_inputs_are_never_written_and_may_be_strided(new: Callable[[], Store]) -> None:
    store = new()
    wide = np.zeros((12, 4), dtype=np.int64)
    wide[::2] = fresh(store, 24).reshape(6, 4)
    before = wide.copy()
    strided = wide[::2, ::3].T
    strided.flags.writeable = False
    store.unify(strided[:1], strided[1:], 1)
    store.freeze(strided[:, 5], 1)
    got = store.resolve(strided)
    expected = [*store.find(strided[0, :5]).tolist(), 0]
    np.testing.assert_array_equal(got, [expected])
    np.testing.assert_array_equal(wide, before)
    parts = store.split(strided[0, :4], [2, 2], 1)
    np.testing.assert_array_equal(store.resolve(store.merge(*parts)), store.resolve(strided[:, :4]))


@each_store
def test_resolve_returns_its_argument_when_nothing_changed(new: Callable[[], Store]) -> None:
    store = new()
    slots = np.concatenate([fresh(store, 4), fresh(store, 4)])
    slots[1, 2] = 0
    assert store.resolve(slots) is slots
    store.unify(slots[:1, :1], slots[1:, :1], 1)
    got = store.resolve(slots)
    assert got is not slots
    assert got[:, 0].tolist() == [slots[0, 0], 0]
    assert store.resolve(np.zeros((2, 5), np.int64)).shape == (0, 5)
    assert store.resolve(np.zeros((0, 5), np.int64)).shape == (0, 5)
    assert store.resolve(np.zeros(0, np.int64)).shape == (0, 0)


@each_store
def test_empty_dims(new: Callable[[], Store]) -> None:
    store = new()
    nothing = np.zeros((1, 0), dtype=np.int64)
    assert store.fresh(0) == 1
    assert store.size == 1
    store.unify(nothing, nothing, 1)
    store.tie(nothing, 1)
    assert [dim.shape for dim in store.split(nothing, [0, 3], 1)] == [(0, 0), (0, 3)]
    assert store.merge(nothing, fresh(store, 2)).shape == (2, 0)
    assert store.find([]).shape == (0,)
    assert store.occurrences(nothing).shape == (0, 2)
    single = fresh(store, 1)
    assert store.split(single, [], 3) == []
    assert store.reason(int(single[0, 0])) == 3


@each_store
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.find([1, 99]), r"labels should lie in \[0, 6\), got"),
        (lambda s: s.freeze(np.asarray([-1]), 1), r"labels should lie in \[0, 6\), got"),
        (lambda s: s.reason(6), r"labels should lie in \[0, 6\), got"),
        (lambda s: s.resolve(np.ones((1, 2))), "labels should be integers, got dtype float64"),
        (lambda s: s.resolve(np.ones((1, 1, 2), int)), r"slots \(k, n\), got shape \(1, 1, 2\)"),
        (lambda s: s.unify([1, 2], [3], 1), "dims of one size, got 2 and 1 columns"),
        (lambda s: s.union([1, 2], [3], 1), "dims of one size, got 2 and 1 columns"),
        (lambda s: s.unify([1, 2], [3, 99], 1), r"labels should lie in \[0, 6\), got"),
        (lambda s: s.split([1, 2, 3, 4], [2, 3], 1), r"product 4, got \[2, 3\]"),
        (lambda s: s.split([1, 2, 3, 4], [-2, -2], 1), r"product 4, got \[-2, -2\]"),
        (lambda s: s.set_flag([1], 3), "power of two from 1 to 128, got 3"),
        (lambda s: s.fresh(-1), r"number of labels to make \(>= 0\), got -1"),
    ],
)
def test_bad_arguments_change_nothing(
    new: Callable[[], Store], call: Callable[[Store], object], message: str
) -> None:
    store = new()
    store.fresh(5)
    with pytest.raises(InvalidArgumentError, match=message):
        call(store)
    assert store.size == 6
    np.testing.assert_array_equal(store.find(np.arange(6)), np.arange(6))
    assert store.frozen(np.arange(6)).tolist() == [True] + [False] * 5


def imported_afresh() -> ModuleType:
    spec = importlib.util.spec_from_file_location("labels_again", Path(labels_module.__file__))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_environment_selects_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHANPRUNE_DISABLE_NATIVE", "1")
    module = imported_afresh()
    assert module.LabelStore is module.ReferenceLabelStore


@needs_native
def test_native_store_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CHANPRUNE_DISABLE_NATIVE", raising=False)
    assert imported_afresh().LabelStore is NativeLabelStore
