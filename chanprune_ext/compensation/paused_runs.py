"""Forwards that stop at chosen calls, so that two networks can be walked through side by side.

Every forward runs in a thread of its own, but only ever one of them at a time: control is handed
over and handed back. Threads are what lets a plain Python forward stop in the middle.
"""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..analysis.calls import CallMode, run_model

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

__all__ = ["PausedRun"]


class _Cancelled(BaseException):
    """Unwinds a forward that is no longer needed; not an Exception, so model code lets it pass."""


class _PausingMode(CallMode):
    def __init__(self, run: PausedRun) -> None:
        super().__init__()
        self._run = run

    def before(self, index: int, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._run.on_call(index, name, args, kwargs)

    def after(
        self, index: int, _: str, _args: tuple[Any, ...], _kwargs: dict[str, Any], output: Any
    ) -> Any:
        self._run.on_output(index, output)
        return output


class _Surroundings:
    """What torch keeps for each thread of its own, taken over from the caller's thread."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._default_device = torch.get_default_device()

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if self._stream is not None:
                stack.enter_context(torch.cuda.device(self._stream.device))
                stack.enter_context(torch.cuda.stream(self._stream))
            if self._default_device.type != "cpu":
                stack.enter_context(self._default_device)
            stack.enter_context(torch.no_grad())
            yield


class PausedRun:
    """One forward of ``model`` that can be advanced from call to call.

    The model must be in eval mode already. Call :meth:`close` in the end, come what may.

    Args:
        model: Network to run.
        inputs: Tensor, tuple of positional inputs or dict of keyword inputs.
        names: The calls it must make: those it was recorded with.
        captures: Call indices whose first argument is kept from before the call.
        device: Where the model lives.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        names: Sequence[str],
        captures: Collection[int],
        device: torch.device,
    ) -> None:
        self._names = names
        self._captures = frozenset(captures)
        self._stop_at: int | None = None
        self._cancelled = False
        self._finished = False
        self._error: BaseException | None = None
        self._value: Any = None
        self._to_run = threading.Semaphore(0)
        self._to_caller = threading.Semaphore(0)
        self.captured: dict[int, tuple[Tensor, int]] = {}
        self._thread = threading.Thread(
            target=self._main,
            args=(model, inputs, _Surroundings(device)),
            name="chanprune-forward",
            daemon=True,
        )
        self._started = False

    def _main(self, model: nn.Module, inputs: Any, surroundings: _Surroundings) -> None:
        try:
            with surroundings.entered(), _PausingMode(self):
                self._value = run_model(model, inputs)
        except _Cancelled:
            pass
        except BaseException as error:  # noqa: BLE001 - handed to the caller's thread
            self._error = error
        finally:
            self._finished = True
            self._to_caller.release()

    def on_call(self, index: int, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Called in the forward's thread before every call."""
        if self._cancelled:
            raise _Cancelled
        recorded = self._names[index] if index < len(self._names) else "nothing"
        if name != recorded:
            raise RuntimeError(
                f"call {index} is {name}, but was {recorded} with the first inputs; the calls must "
                "not depend on the data"
            )
        if index in self._captures:
            x = args[0] if args else kwargs["input"]
            self.captured[index] = (x, _version(x))

    def on_output(self, index: int, output: Any) -> None:
        """Called in the forward's thread after every call; waits here while paused."""
        if index != self._stop_at:
            return
        self._value = output
        self._to_caller.release()
        self._to_run.acquire()
        if self._cancelled:
            raise _Cancelled

    def advance(self, call: int) -> Tensor:
        """Runs on until ``call`` has been made.

        Returns:
            The call's output: the very tensor the forward goes on with.
        """
        self._stop_at = call
        if self._started:
            self._to_run.release()
        else:
            self._started = True
            self._thread.start()
        self._to_caller.acquire()
        if self._error is not None:
            raise self._error
        if self._finished:
            raise RuntimeError(f"the forward ended before call {call}")
        value: Tensor = self._value
        self._value = None
        return value

    def captured_input(self, index: int) -> Tensor | None:
        """First argument of call ``index``; None if it has been overwritten since."""
        x, version = self.captured[index]
        return x if version == _version(x) else None

    def refresh(self, index: int) -> None:
        """Takes a captured argument that was written to as what it is now."""
        x, _ = self.captured[index]
        self.captured[index] = (x, _version(x))

    def release(self, index: int) -> None:
        """Lets go of the captured argument of call ``index``."""
        self.captured.pop(index, None)

    def close(self) -> None:
        """Ends the forward wherever it is."""
        self._cancelled = True
        if self._started and not self._finished:
            self._to_run.release()
        if self._started:
            self._thread.join()
        self.captured.clear()
        self._value = None


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version  # noqa: SLF001 - torch has no other name for it
