"""The sequence of torch-level calls one forward makes, recorded once and tapped later by position.

A forward of an eager model is a fixed sequence of calls into torch as long as nothing but widths
changes. Numbering that sequence gives every intermediate tensor a name that is the same in a
network and in its pruned copy, whether it was made by a module or by a bare ``x + y``.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from typing_extensions import Self

from chanprune_ext.errors import AnalysisError
from chanprune_ext.module_modes import evaluating

if TYPE_CHECKING:
    from types import FrameType

__all__ = [
    "Call",
    "CallMode",
    "CallTrace",
    "record_calls",
    "run_model",
    "steady_calls",
    "tap_calls",
]

_TORCH_DIRECTORY = f"{Path(torch.__file__).parent}{os.sep}"
_PACKAGE_DIRECTORY = f"{Path(__file__).resolve().parents[1]}{os.sep}"
# Files of this package that user models may come from: their lines are worth naming.
_MODEL_FILES = frozenset({f"{_PACKAGE_DIRECTORY}models.py"})

# Python-level questions about a tensor: they compute nothing and get no position in the sequence.
_QUERIES = frozenset(
    [
        "size",
        "dim",
        "ndimension",
        "numel",
        "nelement",
        "stride",
        "element_size",
        "storage_offset",
        "is_contiguous",
        "is_floating_point",
        "is_complex",
        "is_signed",
        "is_same_size",
        "get_device",
        "data_ptr",
        "untyped_storage",
        "has_names",
        "__len__",
        "__format__",
        "__repr__",
        "__str__",
        "__hash__",
        "__bool__",
        "item",
        "tolist",
        "requires_grad_",
        "is_pinned",
        "is_set_to",
        "_is_view",
        "__dlpack__",
        "__dlpack_device__",
        "is_storage",
        "is_tensor",
        "is_nonzero",
        "_has_compatible_shallow_copy_type",
        "register_hook",
        "retain_grad",
        "backward",
        "result_type",
        "get_default_dtype",
        "can_cast",
        "promote_types",
        "finfo",
        "iinfo",
        "is_grad_enabled",
        "__reduce_ex__",
    ]
)
_TENSOR_GETTERS = frozenset({"T", "mT", "H", "mH", "data", "real", "imag"})


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


def call_name(func: Any) -> str:
    """The low-level name of a function object handed to ``__torch_function__``."""
    name = getattr(func, "__name__", None) or str(func)
    if name in ("__get__", "__set__"):
        return f"{name}.{getattr(getattr(func, '__self__', None), '__name__', '?')}"
    return str(name)


def is_query(name: str) -> bool:
    """Whether a call of this name only asks about a tensor (no position in the sequence)."""
    if name.startswith("__get__."):
        return name[8:] not in _TENSOR_GETTERS
    return name in _QUERIES


def tensors_in(value: Any) -> list[Tensor]:
    """Tensors inside nested tuples, lists and dicts, in order."""
    found: list[Tensor] = []
    _collect_tensors(value, found)
    return found


def _collect_tensors(value: Any, found: list[Tensor]) -> None:
    if isinstance(value, Tensor):
        found.append(value)
    elif isinstance(value, (tuple, list)):
        for item in value:
            _collect_tensors(item, found)
    elif isinstance(value, Mapping):
        for item in value.values():
            _collect_tensors(item, found)
    elif hasattr(value, "__dataclass_fields__"):
        for field in value.__dataclass_fields__:
            _collect_tensors(getattr(value, field, None), found)


def source_line() -> tuple[str, int]:
    """File and line of the nearest frame outside torch and outside this package's machinery."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name in _MODEL_FILES or not (
            name.startswith((_TORCH_DIRECTORY, _PACKAGE_DIRECTORY, "<"))
            or name.endswith(("contextlib.py", "functools.py"))
        ):
            return name, frame.f_lineno
        frame = frame.f_back
    return "?", 0


class CallMode(TorchFunctionMode):
    """Numbers the torch-level calls made under it. Subclasses override the hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.next_index = 0

    def query(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer a question about a tensor."""
        return func(*args, **kwargs)

    def call(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one call between :meth:`before` and :meth:`after`."""
        index = self.next_index
        self.next_index = index + 1
        self.before(index, name, args, kwargs)
        return self.after(index, name, args, kwargs, func(*args, **kwargs))

    def before(self, index: int, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Called with the arguments of call ``index`` before it runs."""

    def after(
        self,
        index: int,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> Any:
        """Called with the output of call ``index``; returns what the caller gets."""
        return output

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = call_name(func)
        handle = self.query if is_query(name) else self.call
        return handle(name, func, args, kwargs or {})


def _never(*_: Any) -> bool:
    return False


class _LowLevelCalls:
    """Makes Python-level functionals transparent, so that modes see what runs inside them.

    ``torch.nn.functional`` and friends hand a call to an active mode as a whole. For the analysis
    the parts matter (the views inside multi-head attention, say), so the ``has_torch_function``
    tests are switched off there. The switch is process-wide and therefore counted.
    """

    _lock = threading.Lock()
    _depth = 0
    _saved: ClassVar[list[tuple[Any, str, Any]]] = []

    @classmethod
    def enter(cls) -> None:
        with cls._lock:
            cls._depth += 1
            if cls._depth > 1:
                return
            for module in (torch.nn.functional, torch.functional, torch._tensor):
                for name in (
                    "has_torch_function",
                    "has_torch_function_unary",
                    "has_torch_function_variadic",
                ):
                    if hasattr(module, name):
                        cls._saved.append((module, name, getattr(module, name)))
                        setattr(module, name, _never)

    @classmethod
    def leave(cls) -> None:
        with cls._lock:
            cls._depth -= 1
            if cls._depth == 0:
                while cls._saved:
                    module, name, value = cls._saved.pop()
                    setattr(module, name, value)


@contextlib.contextmanager
def steady_calls(model: nn.Module) -> Iterator[None]:
    """Run ``model`` in eval mode, without gradients, with its call sequence fully visible.

    Training flags, the attention fast path and torch's function tests are put back on exit.
    """
    fast_path = torch.backends.mha.get_fastpath_enabled()
    _LowLevelCalls.enter()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with evaluating(model), torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        _LowLevelCalls.leave()


def run_model(model: nn.Module, example_inputs: Any) -> Any:
    """Call ``model`` on a tensor, a tuple (positional) or a dict (keyword) of inputs."""
    if isinstance(example_inputs, Mapping):
        return model(**example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return model(*example_inputs)
    return model(example_inputs)


class ModulePath:
    """The dotted path of the module that is running, kept by global forward hooks."""

    def __init__(self, model: nn.Module) -> None:
        self._names = {id(module): name for name, module in model.named_modules()}
        self._stack: list[str] = []
        self._handles: list[Any] = []
        self._failed: str | None = None

    @property
    def current(self) -> str:
        return self._stack[-1] if self._stack else ""

    @property
    def failed(self) -> str:
        """The innermost module of an error that is on its way out of the model."""
        return self.current if self._failed is None else self._failed

    def __enter__(self) -> Self:
        hooks = torch.nn.modules.module
        self._handles = [
            hooks.register_module_forward_pre_hook(self._push),
            hooks.register_module_forward_hook(self._pop, always_call=True),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _push(self, module: nn.Module, _: Any) -> None:
        # A module made inside a forward is not in the table: it runs under its parent's name.
        self._stack.append(self._names.get(id(module), self.current))

    def _pop(self, *_: Any) -> None:
        # Torch calls this inside its `except` clause when the module's forward has raised.
        raised = sys.exc_info()[0] is not None
        if self._stack:
            left = self._stack.pop()
            if not raised:
                self._failed = None
            elif self._failed is None:
                self._failed = left


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
        results = tensors_in(args[:1]) if name == "__setitem__" else tensors_in(output)
        outputs = tuple(self.values.write(t) for t in results)
        file, line = source_line()
        self.calls.append(
            Call(
                index=index,
                name=name,
                module=self.path.current,
                source=f"{Path(file).name}:{line}",
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
