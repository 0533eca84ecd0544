"""The calls of one forward, recorded once and tapped later by position."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from chanprune_ext.analysis.calls import (
    CallMode,
    results_of,
    run_model,
    source_place,
    steady_calls,
    tensors_in,
)
from chanprune_ext.analysis.module_path import ModulePath
from chanprune_ext.errors import AnalysisError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["Call", "CallTrace", "record_calls", "tap_calls"]


@dataclass(frozen=True)
class Call:
    """One torch-level call of a forward.

    Attributes:
        index: Position in the sequence, starting at 0.
        name: Low-level name, such as ``"conv2d"``, ``"add_"``, ``"cat"``.
        module: Dotted path of the innermost module being run; ``""`` is the root.
        source: ``file.py:line`` of the calling line outside torch.
        inputs: Ids of the tensor values read, in argument order.
        outputs: Ids of the tensor values made. An in-place call gives its result a fresh id.
        parameters: Input value id -> state-dict entry, for inputs that are parameters or buffers.
    """

    index: int
    name: str
    module: str
    source: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    parameters: Mapping[int, str]


@dataclass(frozen=True)
class CallTrace:
    """All calls of one forward.

    Attributes:
        calls: The calls in order.
        output_values: Value ids that the model returns.
    """

    calls: tuple[Call, ...]
    output_values: frozenset[int]

    def consumers(self) -> dict[int, list[int]]:
        """Value id -> indices of the calls that read it."""
        readers: dict[int, list[int]] = {}
        for call in self.calls:
            for value in dict.fromkeys(call.inputs):
                readers.setdefault(value, []).append(call.index)
        return readers

    def producer(self) -> dict[int, int]:
        """Value id -> index of the call that made it."""
        return {value: call.index for call in self.calls for value in call.outputs}


class ValueTable:
    """Gives tensor values ids; keeps the tensors alive, since ids are keyed by object."""

    def __init__(self, model: nn.Module) -> None:
        self._ids: dict[int, int] = {}
        self._alive: list[Any] = []
        self._names: dict[int, str] = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            if isinstance(tensor, Tensor):
                self._names.setdefault(id(tensor), name)
        for name, buffer in model.named_buffers():
            self._names.setdefault(id(buffer), name)
        self.parameters: dict[int, str] = {}

    def read(self, tensor: Tensor) -> int:
        value = self._ids.get(id(tensor))
        return self.write(tensor) if value is None else value

    def write(self, tensor: Tensor) -> int:
        value = len(self._alive)
        self._alive.append(tensor)
        self._ids[id(tensor)] = value
        name = self._names.get(id(tensor))
        if name is not None:
            self.parameters[value] = name
        return value


class _Recorder(CallMode):
    def __init__(self, model: nn.Module, path: ModulePath) -> None:
        super().__init__()
        self.path = path
        self.values = ValueTable(model)
        self.calls: list[Call] = []

    def after(
        self,
        index: int,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> Any:
        inputs = tuple(self.values.read(t) for t in tensors_in((args, kwargs)))
        results = results_of(name, args, output)
        outputs = tuple(self.values.write(t) for t in results)
        self.calls.append(
            Call(
                index=index,
                name=name,
                module=self.path.current,
                source=source_place(),
                inputs=inputs,
                outputs=outputs,
                parameters={
                    v: self.values.parameters[v] for v in inputs if v in self.values.parameters
                },
            )
        )
        return output


def record_calls(model: nn.Module, example_inputs: Any) -> CallTrace:
    """Run ``model`` once and record every torch-level call.

    Args:
        model: Any eager module. It is run in eval mode without gradients and left as it was.
        example_inputs: A tensor, a tuple of positional inputs or a dict of keyword inputs.

    Raises:
        AnalysisError: The model's forward raised; the original error is the cause.
    """
    with steady_calls(model), ModulePath(model) as path:
        recorder = _Recorder(model, path)
        try:
            with recorder:
                output = run_model(model, example_inputs)
        except Exception as error:
            raise AnalysisError(
                f"the model's forward raised while tracing, in module '{path.failed}': {error}"
            ) from error
    values = frozenset(recorder.values.read(t) for t in tensors_in(output))
    return CallTrace(tuple(recorder.calls), values)


class _Stop(BaseException):
    """Ends a tapped forward early; not an Exception, so that no model code swallows it."""


class _Tap(CallMode):
    def __init__(
        self,
        before: Mapping[int, Callable[[tuple[Any, ...], dict[str, Any]], None]],
        after: Mapping[int, Callable[[Any], None]],
        stop_after: int | None,
    ) -> None:
        super().__init__()
        self._before = before
        self._after = after
        self._stop_after = stop_after

    def before(self, index: int, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if index in self._before:
            self._before[index](args, kwargs)

    def after(
        self,
        index: int,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> Any:
        if index in self._after:
            # For an in-place assignment the changed tensor is the result worth seeing.
            self._after[index](args[0] if name == "__setitem__" else output)
        if index == self._stop_after:
            raise _Stop
        return output


def tap_calls(
    model: nn.Module,
    inputs: Any,
    *,
    before: Mapping[int, Callable[[tuple[Any, ...], dict[str, Any]], None]] | None = None,
    after: Mapping[int, Callable[[Any], None]] | None = None,
    stop_after: int | None = None,
) -> Any:
    """Run ``model`` and look at chosen calls on the way.

    Args:
        model: The recorded model, or a pruned copy of it.
        inputs: As for :func:`record_calls`.
        before: Call index -> function of ``(args, kwargs)``, called with the very tensors that the
            call is about to read. Weights changed in place there are used by the call.
        after: Call index -> function of the call's output. A later in-place call may overwrite
            that tensor: copy what must last.
        stop_after: End the forward after this call.

    Returns:
        The model's output, or None when stopped early.
    """
    mode = _Tap(before or {}, after or {}, stop_after)
    with steady_calls(model):
        try:
            with mode:
                return run_model(model, inputs)
        except _Stop:
            return None
