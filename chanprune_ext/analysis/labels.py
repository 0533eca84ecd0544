"""The label store: boolean variables "this index is removed" and the equations between them.

A *label* is a variable; label 0 is the constant "never removed". Labels form classes (equal
variables). A class is free, *frozen* (never removed) or *defined* as the OR of other classes. A
tensor dim of size n carries a *slot array*, int64 of shape (k, n), zeros being padding: index i is
removed iff any label of column i is. Slot arrays are values: never write into one.

Every method only restricts which assignments are possible, so what an earlier call established
holds for ever. Two facts keep definitions sound and acyclic: unions, definitions and freezes touch
*leaves* only (roots without definition), and every operand is first expanded to its leaves.

`ReferenceLabelStore` is the readable implementation and the test oracle of the C++ class;
`LabelStore` is the C++ class where it is built. Both give equal results, bit for bit.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from chanprune_ext.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["MAX_SLOTS", "LabelStore", "ReferenceLabelStore"]

MAX_SLOTS = 8
"""A class is defined as the OR of at most this many others; beyond, everything is tied."""

IntArray = npt.NDArray[np.int64]

_MIXED, _NOWHERE = -1, -2
_HASH_SEED = 0x243F6A8885A308D3
_AXIS_SEED = 0x13198A2E03707344
_WORD = (1 << 64) - 1


class ReferenceLabelStore:
    """Label classes with freezing, OR definitions and axis identities, in Python and numpy.

    Args:
        capacity: Number of labels to make room for at the start; the store grows beyond it.
    """

    def __init__(self, capacity: int = 1024) -> None:
        self._size = 1
        self._parent = np.arange(max(capacity, 16), dtype=np.int64)
        self._frozen = np.zeros_like(self._parent, dtype=bool)
        self._defined = np.zeros_like(self._frozen)
        self._reason = np.full_like(self._parent, -1)
        self._flags = np.zeros_like(self._parent)
        self._label_axis = np.zeros_like(self._parent)
        self._axis_parent = [0]
        self._parts: dict[int, list[int]] = {}
        self._frozen[0] = True

    @property
    def size(self) -> int:
        """Number of labels ever made, label 0 included."""
        return self._size

    def fresh(self, n: int) -> int:
        """Make n consecutive new labels on one new axis and return the first."""
        if n < 0:
            raise InvalidArgumentError(f"n should be the number of labels to make (>= 0), got {n}")
        first, self._size = self._size, self._size + n
        if self._size > len(self._parent):
            self._grow(max(self._size, 2 * len(self._parent)))
        if n:
            self._label_axis[first : self._size] = len(self._axis_parent)
            self._axis_parent.append(len(self._axis_parent))
        return first

    def _grow(self, capacity: int) -> None:
        old = len(self._parent)

        def longer(array: npt.NDArray[Any], fill: int) -> npt.NDArray[Any]:
            return np.concatenate([array, np.full(capacity - old, fill, array.dtype)])

        self._parent = np.concatenate([self._parent, np.arange(old, capacity, dtype=np.int64)])
        self._frozen = longer(self._frozen, 0)
        self._defined = longer(self._defined, 0)
        self._reason = longer(self._reason, -1)
        self._flags = longer(self._flags, 0)
        self._label_axis = longer(self._label_axis, 0)

    # ---------------------------------------------------------------------------- queries

    def find(self, labels: npt.ArrayLike) -> IntArray:
        """Return the class root (its smallest label) of every label; same shape as `labels`."""
        return np.asarray(self._find(self._labels(labels)))

    def frozen(self, labels: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Return for every label whether it can never be removed (label 0 never can)."""
        roots = self.find(labels)
        result = self._frozen[roots.ravel()]
        for i in np.flatnonzero(self._defined[roots.ravel()]):
            result[i] = not self._live([int(roots.flat[i])])
        return result.reshape(roots.shape)

    def reason(self, label: int) -> int:
        """Return the reason a label is frozen for, -1 if it is not or is label 0.

        A defined class is frozen when all its parts are; the first part's reason is returned.
        """
        leaves = self._leaves(int(self.find(label)))
        if not all(self._frozen[leaf] for leaf in leaves):
            return -1
        return next((int(r) for r in self._reason[leaves] if r >= 0), -1)

    def axis(self, labels: npt.ArrayLike) -> IntArray:
        """Return the axis of every label (0 for label 0); united labels share their axis."""
        labels = self._labels(labels)
        axes = self._label_axis[labels]
        roots = [self._axis_root(int(axis)) for axis in axes.ravel()]
        return np.asarray(roots, dtype=np.int64).reshape(labels.shape)

    def flags(self, labels: npt.ArrayLike) -> IntArray:
        """Return the flag bits of every label's class."""
        return self._flags[self.find(labels)]

    def resolve(self, slots: npt.ArrayLike) -> IntArray:
        """Rewrite slots in terms of live leaves: shape (k, n) -> (k', n).

        Per column: roots, definitions expanded, frozen and 0 dropped, duplicates dropped, packed to
        the top in order of first occurrence. k' is the largest set's size, possibly 0.

        Returns:
            A new array, or `slots` itself where it was already in this form.
        """
        slots = self._slots("slots", slots)
        roots = self._find(slots)
        special = np.flatnonzero(self._defined[roots].any(axis=0))
        expanded = [self._live(roots[:, i].tolist()) for i in special]
        roots[self._frozen[roots]] = 0
        roots[:, special] = 0
        for i in range(1, len(roots)):
            roots[i, (roots[i] == roots[:i]).any(axis=0)] = 0
        plain = _compacted(roots)
        result = np.zeros((max([len(plain), *map(len, expanded)]), roots.shape[1]), dtype=np.int64)
        result[: len(plain)] = plain
        for column, leaves in zip(special, expanded, strict=True):
            result[: len(leaves), column] = leaves
        return slots if np.array_equal(result, slots) else result

    def occurrences(self, slots: npt.ArrayLike) -> IntArray:
        """Return the live (root, index) pairs of a slot array, shape (m, 2), by index."""
        resolved = self.resolve(slots)
        index, row = np.nonzero(resolved.T)
        return np.stack([resolved[row, index], index.astype(np.int64)], axis=1)

    def signatures(
        self, param_dim_slots: Sequence[npt.ArrayLike]
    ) -> tuple[IntArray, npt.NDArray[np.uint64]]:
        """Hash each live root by where it occurs, so that equal hash means one prunable group.

        The hash covers the multiset of list positions the root occurs in (once per index) and its
        axis: without the axis, heads and head dims of equal number would fall together.

        Args:
            param_dim_slots: One slot array (k, n) per parameter dim.

        Returns:
            roots (m,) int64 in ascending order, and their hashes (m,) uint64.
        """
        sums: dict[int, int] = {}
        for position, slots in enumerate(param_dim_slots):
            resolved = self.resolve(slots)
            found, counts = np.unique(resolved[resolved != 0], return_counts=True)
            for root, count in zip(found.tolist(), counts.tolist(), strict=True):
                term = count * _mix(_HASH_SEED + position)
                sums[root] = (sums.get(root, 0) + term) & _WORD
        roots = np.asarray(sorted(sums), dtype=np.int64)
        axes = self.axis(roots).tolist()
        hashes = [
            _mix(sums[root] + _mix(_AXIS_SEED + axis))
            for root, axis in zip(roots.tolist(), axes, strict=True)
        ]
        return roots, np.asarray(hashes, dtype=np.uint64)

    # ------------------------------------------------------------------------ restrictions

    def freeze(self, labels: npt.ArrayLike, reason: int) -> None:
        """Never remove these labels. A defined class freezes all its parts; first reason wins."""
        for root in np.unique(self.find(labels)).tolist():
            for leaf in self._leaves(root):
                if not self._frozen[leaf]:
                    self._frozen[leaf] = True
                    self._reason[leaf] = reason

    def set_flag(self, labels: npt.ArrayLike, bit: int) -> None:
        """Set a flag (1, 2, 4, ... or 128) on the classes of `labels` and on their parts."""
        if bit not in (1, 2, 4, 8, 16, 32, 64, 128):
            raise InvalidArgumentError(f"bit should be a power of two from 1 to 128, got {bit}")
        for root in np.unique(self.find(labels)).tolist():
            if root != 0:
                self._flags[[root, *self._leaves(root)]] |= bit

    def union(self, a: npt.ArrayLike, b: npt.ArrayLike, reason: int) -> None:
        """Make a[i] and b[i] equal for every i; where one is never removed, freeze the other."""
        rows = [self._labels(labels).reshape(1, -1) for labels in (a, b)]
        self.unify(rows[0], rows[1], reason)

    def unify(self, a: npt.ArrayLike, b: npt.ArrayLike, reason: int) -> None:
        """Make index i of both dims be removed together, for every i.

        Column by column, on the live leaves of both sides without those they share: nothing against
        x freezes x; a against b unites; a against several defines a as their OR; equal
        numbers unite pairwise in order; anything else ties all of them.

        Args:
            a: Slots of shape (k1, n).
            b: Slots of shape (k2, n).
            reason: Recorded for what gets frozen here; a column that meets one frozen earlier
                takes over that one's reason instead, which is the cause.
        """
        a, b = self._slots("a", a), self._slots("b", b)
        if a.shape[1] != b.shape[1]:
            raise InvalidArgumentError(
                "a and b should be slots of dims of one size, "
                f"got {a.shape[1]} and {b.shape[1]} columns"
            )
        columns: Iterable[int] = range(a.shape[1])
        if len(a) == len(b) == 1:
            columns = np.flatnonzero(self._find(a[0]) != self._find(b[0])).tolist()
        for i in columns:
            self._equate(a[:, i].tolist(), b[:, i].tolist(), reason)

    def tie(self, labels: npt.ArrayLike, reason: int) -> None:
        """Remove all indices together or none.

        Args:
            labels: A row (n,) or slots (k, n). One column without live label freezes the rest.
            reason: As in `unify`.
        """
        columns = self._slots("labels", labels).T.tolist()
        for column in columns:
            if not self._live(column):
                for other in columns:
                    self.freeze(other, self._cause(column, reason))
                return
        self._join_all([leaf for column in columns for leaf in self._live(column)])

    # ---------------------------------------------------------------------- data movement

    def merge(self, a: npt.ArrayLike, b: npt.ArrayLike) -> IntArray:
        """Slots of two dims viewed as one, in C order: (k1, n1), (k2, n2) -> (k1 + k2, n1 * n2)."""
        a, b = self._slots("a", a), self._slots("b", b)
        return np.concatenate(
            [np.repeat(a, b.shape[1], axis=1), np.tile(b, (1, a.shape[1]))], axis=0
        )

    def split(self, row: npt.ArrayLike, sizes: Sequence[int], reason: int) -> list[IntArray]:
        """Slots of one dim viewed as several in C order; the inverse of `merge`.

        A class that fills whole slices of one axis moves there. One that fills everything is frozen
        (removing it would leave nothing). Where a class varies along several axes, new
        labels are made for each of them, and the class becomes their OR.

        Args:
            row: Labels of shape (n,), or slots (k, n).
            sizes: New sizes, with product n.
            reason: As in `unify`.

        Returns:
            One slot array (k_j, sizes[j]) per new dim.
        """
        given = self._slots("row", row)
        sizes = [int(size) for size in sizes]
        n = given.shape[1]
        if any(size < 0 for size in sizes) or int(np.prod(sizes, dtype=np.int64)) != n:
            raise InvalidArgumentError(f"sizes should have the product {n}, got {sizes}")
        rows = self.resolve(given)
        wide = [axis for axis, size in enumerate(sizes) if size > 1]
        if n == 0 or not sizes:
            self.freeze(rows, reason)
            return [np.zeros((0, size), dtype=np.int64) for size in sizes]
        if len(wide) < 2:
            home = wide[0] if wide else 0
            return [rows if j == home else rows[:0, :1] for j in range(len(sizes))]

        coords = np.unravel_index(np.arange(n), sizes)
        owner = self._slice_owners(rows, sizes, coords, wide, reason)
        home_of = np.asarray([[owner.get(root, _MIXED) for root in row] for row in rows.tolist()])
        home_of = home_of.reshape(rows.shape)
        mixed_rows = _compacted(np.where(home_of == _MIXED, rows, 0))
        columns: list[list[list[int]]] = [[[] for _ in range(size)] for size in sizes]
        first: dict[int, list[int]] = {}
        for line, homes in zip(rows, home_of, strict=True):
            self._place(line, homes, coords, columns)
        for line in mixed_rows:
            grid = line.reshape(sizes)
            varying = [j for j in wide if (grid != grid.take([0], axis=j)).any()]
            if len(varying) == 1:
                self._place(line, np.where(line != 0, varying[0], _NOWHERE), coords, columns)
            else:
                self._factor(line, given, sizes, coords, varying, columns, first, reason)
        return [_packed(lists) for lists in columns]

    def _slice_owners(
        self,
        rows: IntArray,
        sizes: Sequence[int],
        coords: tuple[npt.NDArray[np.intp], ...],
        wide: Sequence[int],
        reason: int,
    ) -> dict[int, int]:
        """Map each class that fills whole slices of an axis to it; freeze what fills everything."""
        roots, inverse, counts = np.unique(rows, return_inverse=True, return_counts=True)
        inverse = inverse.reshape(rows.shape)
        owner = {0: _NOWHERE}
        for axis in wide:
            touched = np.unique(inverse * sizes[axis] + coords[axis])
            slices = np.bincount(touched // sizes[axis], minlength=len(roots))
            whole = counts == slices * (rows.shape[1] // sizes[axis])
            for root in roots[whole & (roots != 0)].tolist():
                owner.setdefault(root, axis)
        for root in roots[(counts == rows.shape[1]) & (roots != 0)].tolist():
            owner[root] = _NOWHERE
            self.freeze(root, reason)
        return owner

    def _place(
        self,
        line: IntArray,
        home_of: npt.NDArray[np.intp],
        coords: tuple[npt.NDArray[np.intp], ...],
        columns: list[list[list[int]]],
    ) -> None:
        for position in np.flatnonzero(home_of >= 0).tolist():
            home, root = int(home_of[position]), int(line[position])
            column = columns[home][coords[home][position]]
            if root not in column:
                column.append(root)

    def _factor(
        self,
        mixed: IntArray,
        given: IntArray,
        sizes: Sequence[int],
        coords: tuple[npt.NDArray[np.intp], ...],
        varying: Sequence[int],
        columns: list[list[list[int]]],
        first: dict[int, list[int]],
        reason: int,
    ) -> None:
        """Give each varying axis new labels and make every class of the row the OR of its own."""
        base = {axis: self.fresh(sizes[axis]) for axis in varying}
        for axis in varying:
            for i, column in enumerate(columns[axis]):
                column.append(base[axis] + i)
        for position, root in enumerate(mixed.tolist()):
            labels = [base[axis] + int(coords[axis][position]) for axis in varying]
            if root == 0:
                why = self._cause(given[:, position].tolist(), reason)
                self.freeze(labels, why)
            elif root not in first:
                first[root] = labels
                self._define(root, labels)
            elif len(first[root]) == len(labels):
                self.union(labels, first[root], reason)
            else:
                self._equate(labels, first[root], reason)

    # ------------------------------------------------------------------------- internals

    def _labels(self, labels: npt.ArrayLike) -> IntArray:
        array = np.asarray(labels)
        if array.size == 0:
            return array.astype(np.int64)
        if array.dtype.kind not in "iu":
            raise InvalidArgumentError(f"labels should be integers, got dtype {array.dtype}")
        if array.min() < 0 or array.max() >= self._size:
            raise InvalidArgumentError(
                f"labels should lie in [0, {self._size}), got {array.min()} to {array.max()}"
            )
        return array.astype(np.int64, copy=False)

    def _slots(self, name: str, slots: npt.ArrayLike) -> IntArray:
        array = self._labels(slots)
        if array.ndim == 1:
            array = array[None]
        if array.ndim != 2:
            raise InvalidArgumentError(
                f"{name} should be a row (n,) or slots (k, n), got shape {array.shape}"
            )
        return array

    def _find(self, labels: IntArray) -> IntArray:
        roots = self._parent[labels]
        while not np.array_equal(above := self._parent[roots], roots):
            roots = above
        self._parent[labels] = roots
        return roots

    def _root(self, label: int) -> int:
        parent = self._parent
        while (above := int(parent[label])) != label:
            parent[label] = parent[above]
            label = above
        return label

    def _axis_root(self, axis: int) -> int:
        parent = self._axis_parent
        while parent[axis] != axis:
            parent[axis] = parent[parent[axis]]
            axis = parent[axis]
        return axis

    def _leaves(self, root: int) -> list[int]:
        """Expand a root to leaves, frozen ones included, and shorten its definition to them."""
        if not self._defined[root]:
            return [root]
        leaves: list[int] = []
        seen: set[int] = set()
        pending = self._parts[root][::-1]
        while pending:
            part = self._root(pending.pop())
            if part in seen:
                continue
            seen.add(part)
            if self._defined[part]:
                pending.extend(self._parts[part][::-1])
            else:
                leaves.append(part)
        self._parts[root] = leaves
        return leaves

    def _live(self, labels: Iterable[int]) -> list[int]:
        """Distinct live leaves of some labels, in order of first occurrence."""
        live: dict[int, None] = {}
        for label in labels:
            for leaf in self._leaves(self._root(label)):
                if not self._frozen[leaf]:
                    live[leaf] = None
        return list(live)

    def _cause(self, column: Iterable[int], reason: int) -> int:
        """The reason that already froze a column, else the given one."""
        return next((r for label in column if (r := self.reason(label)) >= 0), reason)

    def _join(self, a: int, b: int) -> None:
        """Unite the classes of two live leaves and their axes; the smaller root stays."""
        a, b = sorted((self._root(a), self._root(b)))
        if a == b:
            return
        self._parent[b] = a
        self._flags[a] |= self._flags[b]
        x, y = sorted(self._axis_root(int(self._label_axis[leaf])) for leaf in (a, b))
        self._axis_parent[y] = x

    def _join_all(self, leaves: Sequence[int]) -> None:
        for leaf in leaves[1:]:
            self._join(leaves[0], leaf)

    def _define(self, leaf: int, parts: Sequence[int]) -> None:
        """Make a leaf the OR of other leaves; acyclic, since leaves lead nowhere."""
        self._parts[leaf] = list(parts)
        self._defined[leaf] = True
        roots = [self._root(part) for part in parts]
        self._flags[roots] |= self._flags[leaf]

    def _equate(self, a: Sequence[int], b: Sequence[int], reason: int) -> None:
        """Make OR(a) == OR(b) true for every assignment; see `unify`."""
        left, right = self._live(a), self._live(b)
        only_left = [leaf for leaf in left if leaf not in right]
        only_right = [leaf for leaf in right if leaf not in left]
        if not only_left or not only_right:
            if not left:
                reason = self._cause(a, reason)
            elif not right:
                reason = self._cause(b, reason)
            self.freeze(only_left + only_right, reason)
        elif len(only_left) == len(only_right):
            for x, y in zip(only_left, only_right, strict=True):
                self._join(x, y)
        elif len(only_left) == 1 and len(only_right) <= MAX_SLOTS:
            self._define(only_left[0], only_right)
        elif len(only_right) == 1 and len(only_left) <= MAX_SLOTS:
            self._define(only_right[0], only_left)
        else:
            self._join_all(only_left + only_right)


def _mix(word: int) -> int:
    """The splitmix64 finaliser (Steele, Lea, Flood 2014): a 64-bit bijection that scatters."""
    word = (word + 0x9E3779B97F4A7C15) & _WORD
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
    return word ^ (word >> 31)


def _compacted(slots: IntArray) -> IntArray:
    """The same slots with the zeros of every column moved down and all-zero rows left out."""
    depth = int((slots != 0).sum(axis=0).max(initial=0))
    if len(slots) > 1:
        order = np.argsort(slots == 0, axis=0, kind="stable")
        slots = np.take_along_axis(slots, order, axis=0)
    return slots[:depth]


def _packed(columns: Sequence[Sequence[int]]) -> IntArray:
    """Slots (k, n) from the label list of each index, short lists padded with zeros."""
    slots = np.zeros((max(map(len, columns), default=0), len(columns)), dtype=np.int64)
    for i, column in enumerate(columns):
        slots[: len(column), i] = column
    return slots


if TYPE_CHECKING or os.environ.get("CHANPRUNE_DISABLE_NATIVE") == "1":
    LabelStore = ReferenceLabelStore
else:
    try:
        from chanprune_ext._coupling import LabelStore
    except ImportError:
        LabelStore = ReferenceLabelStore
