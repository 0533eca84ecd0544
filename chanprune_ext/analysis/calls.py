"""The sequence of torch-level calls that one forward makes.

A forward of an eager model is a fixed sequence of calls into torch as long as nothing but widths
changes. Numbering that sequence gives every intermediate tensor a name that is the same in a
network and in its pruned copy, whether it was made by a module or by a bare ``x + y``.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch._C import _are_functorch_transforms_active, _is_torch_function_all_disabled
from torch._ops import HigherOrderOperator
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from chanprune_ext.checksum import checksum
from chanprune_ext.module_modes import evaluating

if TYPE_CHECKING:
    from types import FrameType

__all__ = [
    "PACKAGE_DIRECTORY",
    "CallMode",
    "OperationMode",
    "argument_of",
    "call_name",
    "is_query",
    "results_of",
    "run_model",
    "schema_name",
    "source_line",
    "source_place",
    "steady_calls",
    "tensors_in",
]

_TORCH_DIRECTORY = f"{Path(torch.__file__).parent}{os.sep}"
PACKAGE_DIRECTORY = f"{Path(__file__).resolve().parents[1]}{os.sep}"
Run = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
# Python-level calls that hand the values of a tensor to code outside torch.
VALUE_READS = frozenset(
    {
        *("__bool__", "__int__", "__float__", "__index__", "__complex__", "item", "tolist"),
        *("is_nonzero", "equal", "allclose", "numpy", "__array__", "__dlpack__", "data_ptr"),
    }
)
# Files of this package that user models may come from: their lines are worth naming.
_MODEL_FILES = frozenset({f"{PACKAGE_DIRECTORY}models.py"})

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


@functools.lru_cache(maxsize=4096)
def schema_name(op: Any) -> str:
    """Name of an ATen operation, without overload: ``"aten::add"``."""
    return str(op._schema.name)


@functools.lru_cache(maxsize=4096)
def _described(func: Any) -> tuple[str, bool, bool]:
    """Name of a function, whether it only asks about a tensor, and whether it makes one."""
    name = call_name(func)
    return name, is_query(name), func in _device_constructors()


# What most arguments are: looked up before anything slower is asked.
_PLAIN = frozenset({int, float, bool, str, type(None), torch.dtype, torch.device, slice})


def tensors_in(value: Any) -> list[Tensor]:
    """Tensors inside nested tuples, lists and dicts, in order."""
    if type(value) is Tensor:
        return [value]
    found: list[Tensor] = []
    _collect_tensors(value, found)
    return found


def _collect_tensors(value: Any, found: list[Tensor]) -> None:
    kind = type(value)
    if kind in _PLAIN:
        return
    if kind is tuple or kind is list:
        for item in value:
            # The usual members by their type: every call made is looked through several times.
            if type(item) is Tensor:
                found.append(item)
            elif type(item) not in _PLAIN:
                _collect_tensors(item, found)
    elif isinstance(value, Tensor):
        found.append(value)
    elif isinstance(value, (tuple, list)):
        for item in value:
            _collect_tensors(item, found)
    elif isinstance(value, Mapping):
        for item in value.values():
            _collect_tensors(item, found)
    elif hasattr(value, "__dataclass_fields__"):
        # What is stored: settings that each layer has of its own may refuse to be read.
        stored = getattr(value, "__dict__", None)
        for name in value.__dataclass_fields__:
            item = getattr(value, name, None) if stored is None else stored.get(name)
            _collect_tensors(item, found)


def argument_of(args: tuple[Any, ...], kwargs: Mapping[str, Any], position: int, name: str) -> Any:
    """An argument of a call, given by its position or by its name; None if it was left out."""
    return args[position] if len(args) > position else kwargs.get(name)


def results_of(name: str, args: tuple[Any, ...], output: Any) -> list[Tensor]:
    """The tensors a call has made; an assignment to a part of one changes that one."""
    return tensors_in(args[:1] if name == "__setitem__" else output)


@functools.lru_cache(maxsize=1024)
def _file_name(path: str) -> str:
    return os.path.basename(path)  # noqa: PTH119 - any text a code object gives as its file


def source_place() -> str:
    """``file.py:line`` of :func:`source_line`."""
    file, line = source_line()
    return f"{_file_name(file)}:{line}"


def source_line() -> tuple[str, int]:
    """File and line of :func:`user_frame`."""
    frame = user_frame()
    return ("?", 0) if frame is None else (frame.f_code.co_filename, frame.f_lineno)


def user_frame() -> FrameType | None:
    """The nearest frame outside torch and outside this package's machinery."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not is_user_file(frame.f_code.co_filename):
        frame = frame.f_back
    return frame


def raising_line(error: BaseException) -> str:
    """``file.py:line`` of the innermost line outside torch where an error was, or ``""``."""
    place = ""
    step = error.__traceback__
    while step is not None:
        if is_user_file(step.tb_frame.f_code.co_filename):
            place = f"{Path(step.tb_frame.f_code.co_filename).name}:{step.tb_lineno}"
        step = step.tb_next
    return place


@functools.lru_cache(maxsize=1024)
def is_user_file(name: str) -> bool:
    return name in _MODEL_FILES or not (
        name.startswith((_TORCH_DIRECTORY, PACKAGE_DIRECTORY, "<"))
        or name.endswith(("contextlib.py", "functools.py"))
    )


class CallMode(TorchFunctionMode):
    """Numbers the torch-level calls made under it. Subclasses override the hooks.

    Args:
        device: Where calls make tensors that name no device. (``with torch.device(...)`` would do
            the same as a second mode below this one, which every question about a tensor's shape
            would have to pass.)
    """

    def __init__(self, device: torch.device | None = None) -> None:
        super().__init__()
        self.next_index = 0
        self.device = device
        self.running = False

    def query(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer a question about a tensor."""
        return func(*args, **kwargs)

    def run(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the function of a call."""
        return func(*args, **kwargs)

    def call(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one call between :meth:`before` and :meth:`after`."""
        index = self.next_index
        self.next_index = index + 1
        self.before(index, name, args, kwargs)
        output = self.run(name, func, args, kwargs)
        return self.after(index, name, args, kwargs, output)

    def operation(self, func: Any, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Number an operation that belongs to no call, as a call with the name of its schema.

        There is nothing to be seen of where its arguments come from: none of them may change, but
        for sizes, which show in its result.

        Args:
            func: The operation.
            run: Runs an operation, given with its arguments.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
        """
        name = schema_name(func)
        named = {**dict(zip(_argument_names(func), args, strict=False)), **kwargs}
        given = {key: value for key, value in named.items() if key not in _SIZES}
        given["implied"] = _implied_numbers(name, named)
        given["num_groups"] = named.get("group")  # as torch's function calls it, and its rule
        if name == _CONSTANT and self.device is not None:
            args = (args[0].to(self.device),)
        return self.call(name, lambda **_: run(func, args, kwargs), (), given)

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
        name, asks, makes = _described(func)
        kwargs = kwargs or {}
        if makes and self.device is not None and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": self.device}
        if not asks and _are_functorch_transforms_active():
            # Its tensors hide dims (vmap) or are wrapped: what it comes down to is numbered.
            return self.query(name, func, args, kwargs)
        outer, self.running = self.running, True
        try:
            return (self.query if asks else self.call)(name, func, args, kwargs)
        finally:
            self.running = outer


class OperationMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Numbers the operations that belong to no call, beside those that do.

    Constructors such as ``torch.FloatTensor``, TorchScript and the transforms of ``torch.func`` run
    operations that no function mode hears of. The Python code that torch itself runs for an
    operation on stand-ins is no part of the forward, and is kept from the function modes.

    Only for stand-ins: on a GPU, TorchScript fuses operations after a few runs.

    Args:
        calls: What numbers the calls of the same forward.
    """

    supports_higher_order_operators = True

    def __init__(self, calls: CallMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls = calls
        self.error: Exception | None = None  # what TorchScript may raise another one in place of

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation."""
        return func(*args, **kwargs)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.calls.running:
            return self.run(func, args, kwargs)
        hidden = isinstance(func, HigherOrderOperator) or _is_torch_function_all_disabled()
        with torch._C.DisableTorchFunction():  # noqa: SLF001
            if hidden or schema_name(func).startswith("prim::"):
                return self.run(func, args, kwargs)
            try:
                return self.calls.operation(func, self.run, args, kwargs)
            except Exception as error:
                self.error = error
                raise


@functools.lru_cache(maxsize=4096)
def _argument_names(op: Any) -> tuple[str, ...]:
    return tuple(argument.name for argument in op._schema.arguments)


# What makes a constant of numbers from Python.
_CONSTANT = "aten::lift_fresh"
# Arguments of operations that only say which shape is made.
_SIZES = frozenset({"size", "split_size", "split_sizes", "normalized_shape", "N", "C", "HxW"})


def _implied_numbers(name: str, named: Mapping[str, Any]) -> Any:
    """Numbers that an operation computes with, though they are not among its arguments."""
    if name == _CONSTANT:
        values = named["self"]
        with _disable_current_modes():  # it is real, whatever the model runs on
            return values.tolist() if values.numel() <= 8 else checksum(values)
    if "scaled_dot_product" in name and named.get("scale") is None:
        return float(max(named["query"].shape[-1], 1) ** -0.5)
    return None


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
