"""A forward on stand-ins for its shapes alone, which asks torch for as few calls as it can.

As :mod:`.meta_kernels` lowers them, and more: nobody looks at the operations inside a call here, so
of those that torch takes to pieces the result is enough.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch.utils._python_dispatch import _get_current_dispatch_mode, _pop_mode_temporarily
from typing_extensions import Self

from chanprune_ext.analysis.calls import CallMode, OperationMode
from chanprune_ext.analysis.handlers import entering
from chanprune_ext.analysis.meta_kernels import UNARY, empty, is_plain, lowered, unary

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["MetaCalls", "run_call"]

_Outcome = Callable[[tuple[Any, ...], dict[str, Any]], "Tensor | None"]
_OUTCOMES: dict[str, _Outcome] = {}


_results_in = entering(_OUTCOMES)


@_results_in("matmul", "__matmul__", "bmm")
def _matmul(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Of (.., M, K) and (.., K, N), with the same dims in front."""
    if kwargs or len(args) != 2 or not (is_plain(args[0]) and is_plain(args[1])):
        return None
    left, right = args
    if left.dim() < 3 or left.dtype != right.dtype or left.shape[:-2] != right.shape[:-2]:
        return None
    if left.shape[-1] != right.shape[-2]:
        return None
    return empty((*left.shape[:-1], right.shape[-1]), left)


@_results_in("scaled_dot_product_attention")
def _attention(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Of queries, keys and values with the same dims in front, without a mask or dropout."""
    names = ("attn_mask", "dropout_p", "is_causal")
    rest = {**dict(zip(names, args[3:], strict=False)), **kwargs}
    if len(args) < 3 or len(args) > 6 or not rest.keys() <= {*names, "scale"}:
        return None
    if rest.get("attn_mask") is not None or rest.get("dropout_p", 0.0) != 0.0:
        return None
    query, key, value = args[:3]
    if not all(is_plain(t) and t.dim() == 4 and t.dtype == query.dtype for t in args[:3]):
        return None
    if not query.shape[:2] == key.shape[:2] == value.shape[:2]:
        return None
    if query.shape[3] != key.shape[3] or key.shape[2] != value.shape[2]:
        return None
    return empty((*query.shape[:3], value.shape[3]), query)


@_results_in("roll")
def _roll(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Of ``(x, shifts, dims)``, as many of these as of those."""
    rest = {**dict(zip(("shifts", "dims"), args[1:], strict=False)), **kwargs}
    if not args or len(args) > 3 or rest.keys() != {"shifts", "dims"} or not is_plain(args[0]):
        return None
    shifts, dims = rest["shifts"], rest["dims"]
    if type(shifts) not in (tuple, list) or type(dims) not in (tuple, list):
        return None
    rank = args[0].dim()
    if len(shifts) != len(dims) or not dims or not all(-rank <= d < rank for d in dims):
        return None
    return empty(args[0].shape, args[0])


def run_call(name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a torch-level call on stand-ins."""
    found = lowered(name, args, kwargs)
    if found is not None:
        return found.result
    outcome = _OUTCOMES.get(name)
    if outcome is not None:
        output = outcome(args, kwargs)
    else:
        output = unary(name, args, kwargs) if name.rstrip("_") in UNARY else None
    if output is not None:
        return output
    mode = _get_current_dispatch_mode()
    if type(mode) is not OperationMode:
        return func(*args, **kwargs)
    # What a call runs has no numbers of its own: nobody needs to hear of it.
    with _pop_mode_temporarily():
        return func(*args, **kwargs)


class MetaCalls(CallMode):
    """Runs a model on stand-ins, without asking torch where it can; numbers lone operations too."""

    def __init__(self, device: torch.device | None = None) -> None:
        super().__init__(device)
        self._operations = OperationMode(self)

    def __enter__(self) -> Self:
        self._operations.__enter__()  # type: ignore[no-untyped-call]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        super().__exit__(kind, error, traceback)  # type: ignore[no-untyped-call]
        self._operations.__exit__(kind, error, traceback)  # type: ignore[no-untyped-call]
        if self._operations.error is not None and "TorchScript interpreter" in str(error):
            raise self._operations.error from error

    def run(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the function of a call, or what stands in for it."""
        return run_call(name, func, args, kwargs)
