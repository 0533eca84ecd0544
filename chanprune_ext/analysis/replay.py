"""Run a plan on stand-in tensors and check that the network makes the same calls as before."""

from __future__ import annotations

import contextlib
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from chanprune_ext.analysis.calls import results_of, source_place, steady_calls, tensors_in
from chanprune_ext.analysis.meta_calls import MetaCalls
from chanprune_ext.analysis.meta_kernels import empty, has_no_values
from chanprune_ext.analysis.module_path import ModulePath
from chanprune_ext.analysis.scales import fold_scales, scale_factor
from chanprune_ext.analysis.settings import contents_of, derived_of, owner_of
from chanprune_ext.analysis.sizes import literals_in, numbers_in
from chanprune_ext.analysis.stand_ins import (
    call_substituted,
    held_tensors_of,
    substitute,
    substrate_device,
    substrate_mode,
)
from chanprune_ext.analysis.tracer import Event
from chanprune_ext.errors import VerificationError
from chanprune_ext.widths import set_widths

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from chanprune_ext.analysis.groups import Analysis, Sizes
    from chanprune_ext.analysis.provenance import Attribute
    from chanprune_ext.analysis.scales import Rescaling
    from chanprune_ext.analysis.trace import TracedCall
    from chanprune_ext.analysis.tracer import Slots

__all__ = ["DivergenceError", "patched_attributes", "replay", "set_attributes"]


class DivergenceError(VerificationError):
    """A replay left the traced path.

    Attributes:
        where: The place.
        slots: The dimensions made at that point.
        later: Other places, further on, where it would have left the path by itself: found as if
            all before had gone as predicted.
    """

    def __init__(self, message: str, where: Event, slots: tuple[Slots, ...] = ()) -> None:
        super().__init__(message)
        self.where = where
        self.slots = slots
        self.later: tuple[DivergenceError, ...] = ()

    def alike(self) -> list[DivergenceError]:
        """Later places on the same line of code, the first one of every other module.

        What differs elsewhere in the code may follow from what has differed here.
        """
        found = {self.where.module: self}
        for other in self.later:
            if (other.where.op, other.where.source) == (self.where.op, self.where.source):
                found.setdefault(other.where.module, other)
        return list(found.values())[1:]


def set_attributes(
    model: nn.Module, values: Mapping[Attribute, int]
) -> list[tuple[dict[str, Any], str, Any]]:
    """Set ints stored on modules, or in settings of theirs.

    Returns:
        ``(where they stand, name, old value)`` of each for undoing.
    """
    done: list[tuple[dict[str, Any], str, Any]] = []
    for attribute, value in values.items():
        owner, name = owner_of(model, attribute)
        held = contents_of(owner)  # settings may be frozen
        old = held[name]
        done.append((held, name, old))
        if attribute.position is None:
            held[name] = value
        else:
            items = list(old)
            items[attribute.position] = value
            held[name] = type(old)(items)
        module = model.get_submodule(attribute.module)
        for name, derived in derived_of(module).items():
            done.append((module.__dict__, name, module.__dict__.get(name)))
            module.__dict__[name] = derived
    return done


@contextlib.contextmanager
def patched_attributes(model: nn.Module, values: Mapping[Attribute, int]) -> Iterator[None]:
    """Set ints stored on modules for a while."""
    done = set_attributes(model, values)
    try:
        yield
    finally:
        for held, name, old in reversed(done):
            held[name] = old


class _ReplayMode(MetaCalls):
    """Compares every call with the traced one, and its shapes with the predicted ones."""

    def __init__(self, analysis: Analysis, sizes: Sizes, path: ModulePath) -> None:
        super().__init__(substrate_device(analysis.trace.substrate))
        self.calls = list(analysis.trace.calls)
        self.real = analysis.trace.substrate == "real"
        self.store = analysis.trace.store
        # Labels of parameters are the first that are made.
        seeds = (s for dims in analysis.trace.parameters.values() for s in dims)
        self.last_seed = max((int(s.max(initial=0)) for s in seeds), default=0)
        self.adrift = False
        self.sizes = sizes
        self.path = path
        self.factors: dict[int, float] = {}
        # Without values, what comes next can be looked at as if all had gone as predicted.
        self.goes_on = analysis.trace.substrate == "meta"
        self.differences: list[DivergenceError] = []

    def call(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        index = self.next_index
        try:
            return super().call(name, func, args, kwargs)
        except VerificationError:
            raise
        except Exception as error:
            output = self.predicted_output(index, name, args, kwargs)
            if output is None:
                raise
            self.differences.append(self.diverged(does_not_run(self.path.failed, error)))
            return output

    def predicted_output(
        self, index: int, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor | None:
        """What a call that fails was to make; None where that is not for certain one new tensor."""
        if not self.goes_on or index >= len(self.calls) or self.calls[index].name != name:
            return None
        dtypes = {t.dtype for t in tensors_in((args, kwargs)) if t.is_floating_point()}
        expected = self.calls[index].outputs
        if len(expected) != 1 or len(dtypes) != 1 or name not in _MAKES_ONE:
            return None
        return self.stand_in(expected[0], dtypes.pop())

    def stand_in(self, dims: tuple[Slots, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty([self.sizes.of(s) for s in dims], dtype=dtype, device="meta")

    def differs(self, error: DivergenceError) -> None:
        """Remember a difference, or stop at it."""
        if not self.goes_on:
            raise error
        self.differences.append(error)

    def after(
        self, index: int, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        if self.adrift and (index >= len(self.calls) or name != self.calls[index].name):
            self.calls = []
        if self.adrift and not self.calls:
            return output
        where = f"call {index} ({name}) in '{self.path.current}'"
        if index >= len(self.calls):
            raise self.diverged(f"the pruned model makes one call more than before: {where}")
        expected = self.calls[index]
        if name != expected.name:
            raise self.diverged(
                f"the pruned model takes another path: {where}, before {expected.name} in "
                f"'{expected.module}'"
            )
        results = results_of(name, args, output)
        shapes = [tuple(t.shape) for t in results]
        predicted = [tuple([self.sizes.of(s) for s in dims]) for dims in expected.outputs]
        if shapes != predicted and self.follow_values(shapes, expected):
            self.adrift = True  # and so may its numbers be
            return output
        numbers = numbers_in(name, args, kwargs)
        if expected.numbers is not None and numbers != expected.numbers:
            factor = scale_factor(name, expected.numbers, numbers)
            if factor is None:
                self.differs(
                    self.diverged(
                        f"a number computed from a size has changed from {expected.numbers} to "
                        f"{numbers}: {where}"
                    )
                )
            else:
                self.factors[index] = factor
        for before, now in zip_longest(expected.literals, literals_in(name, args, kwargs)):
            if before is not None and now != before:
                self.differs(
                    self.diverged(
                        f"an argument that depends on a size has changed from {before!r} to "
                        f"{now!r}: {where}"
                    )
                )
                break
        if shapes != predicted:
            error = self.diverged(
                f"the pruned model makes shapes {shapes} where {predicted} was predicted: {where}"
            )
            # Only what is new can be put right: others may look at the tensor as it is.
            if name not in _MAKES_ONE or len(expected.outputs) != 1 or output is not results[0]:
                raise error
            self.differs(error)
            return self.stand_in(expected.outputs[0], output.dtype)
        return output

    def follow_values(self, shapes: list[tuple[int, ...]], expected: TracedCall) -> bool:
        """Whether other shapes than predicted can come from other values (boxes that survive, say).

        Only on real tensors, and only in dimensions that have nothing to do with channels. What
        comes later may take another path; that it runs is what is left to see.
        """
        if len(shapes) != len(expected.outputs):
            return self.real and all(self.is_no_width(s) for dims in expected.outputs for s in dims)
        return self.real and all(
            len(shape) == len(dims)
            and all(
                n == self.sizes.of(s) or self.is_no_width(s)
                for n, s in zip(shape, dims, strict=True)
            )
            for shape, dims in zip(shapes, expected.outputs, strict=True)
        )

    def is_no_width(self, slots: Slots) -> bool:
        """Whether a dimension neither comes from a parameter nor can shrink with one.

        Once values have made a difference, it may be merged with channels that cannot shrink.
        """
        foreign = self.adrift or bool((slots > self.last_seed).all())
        return foreign and not len(self.store.resolve(slots))

    def diverged(self, message: str) -> DivergenceError:
        """The error for the call that is running, with the dimensions it made in the trace."""
        index = min(self.next_index, len(self.calls)) - 1
        slots = tuple(s for dims in self.calls[index].outputs for s in dims) if index >= 0 else ()
        name = self.calls[index].name if index >= 0 else ""
        return DivergenceError(
            message, Event(name, self.path.current, source_place(), message), slots
        )


# Calls whose result is one tensor that nobody has seen before.
_MAKES_ONE = frozenset(
    (
        *(f"conv{d}d" for d in (1, 2, 3)),
        *(f"conv_transpose{d}d" for d in (1, 2, 3)),
        *("linear", "matmul", "__matmul__", "bmm", "baddbmm", "addmm", "mm", "einsum"),
        *("scaled_dot_product_attention", "group_norm", "layer_norm", "batch_norm", "rms_norm"),
        *("add", "sub", "mul", "div", "__add__", "__radd__", "__sub__", "__rsub__", "__mul__"),
        *("__rmul__", "__truediv__", "pow", "cat", "concat", "concatenate", "stack", "pad"),
        *("view", "reshape", "unflatten", "flatten", "expand", "narrow", "__getitem__", "permute"),
        *("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "repeat", "repeat_interleave"),
        *("mean", "sum", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "interpolate"),
    )
)


def does_not_run(module: str, error: Exception) -> str:
    """The message of what a forward has raised."""
    return f"the pruned model does not run, in module '{module}': {error}"


def replay(
    analysis: Analysis,
    model: nn.Module,
    example_inputs: Any,
    masks: Mapping[str, Mapping[int, np.ndarray]],
    attributes: Mapping[Attribute, int],
    sizes: Sizes,
) -> tuple[Rescaling, ...]:
    """Prove on stand-ins that a removal leaves a network that runs as predicted.

    The model runs with what surgery will leave of it: tensors of the kept shapes, the attributes
    that the removal asks for, and the widths that torch's own layers tell.

    Returns:
        What must be multiplied for constants computed from a width to mean what they meant.

    Raises:
        DivergenceError: A call, a shape or a constant differs; the message names the place.
    """
    with (
        steady_calls(model),
        ModulePath(model) as path,
        substrate_mode(analysis.trace.substrate) as stand_in,
    ):
        tensors = {
            name: _narrowed(t, masks[name], stand_in) if name in masks else stand_in(t)
            for name, t in held_tensors_of(model).items()
        }
        inputs = substitute(example_inputs, stand_in)
        mode = _ReplayMode(analysis, sizes, path)
        try:
            with patched_attributes(model, attributes), mode:
                call_substituted(model, tensors, inputs, prepare=set_widths)
        except VerificationError:
            _raise_first(mode.differences)
            raise
        except Exception as error:
            _raise_first(mode.differences)
            raise mode.diverged(does_not_run(path.failed, error)) from error
        _raise_first(mode.differences)
        if mode.next_index != len(analysis.trace.calls) and not mode.adrift:
            raise mode.diverged(
                f"the pruned model makes {mode.next_index} calls, before "
                f"{len(analysis.trace.calls)}"
            )
    return _folded(analysis, model, example_inputs, mode.factors) if mode.factors else ()


def _raise_first(differences: list[DivergenceError]) -> None:
    """Raise the first of several differences, which knows of the others; nothing for none."""
    if differences:
        first, *later = differences
        first.later = tuple(later)
        raise first


def _folded(
    analysis: Analysis, model: nn.Module, example_inputs: Any, factors: Mapping[int, float]
) -> tuple[Rescaling, ...]:
    rescalings, refused = fold_scales(model, example_inputs, analysis.trace.substrate, factors)
    _raise_first([_not_folded(analysis.trace.calls[i], i, factors[i]) for i in refused])
    return tuple(rescalings)


def _not_folded(call: TracedCall, index: int, factor: float) -> DivergenceError:
    why = (
        f"a number computed from a size would change by x{1 / factor:.4g} and cannot be "
        f"folded into a weight"
    )
    return DivergenceError(
        f"{why}: call {index} ({call.name}) in '{call.module}'",
        Event(call.name, call.module, call.source, why),
        call.inputs[0],
    )


def _narrowed(
    tensor: Tensor, masks: Mapping[int, np.ndarray], stand_in: Callable[[Tensor], Tensor]
) -> Tensor:
    """A stand-in of what a tensor keeps."""
    whole = stand_in(tensor)
    if has_no_values(whole):
        shape = list(whole.shape)
        for dim, mask in masks.items():
            shape[dim] = int(np.count_nonzero(mask))
        return empty(shape, whole)
    for dim, mask in masks.items():
        whole = whole.index_select(dim, torch.from_numpy(mask.nonzero()[0]).to(whole.device))
    return whole
