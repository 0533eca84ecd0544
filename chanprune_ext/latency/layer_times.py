"""Measured times of single layers at given shapes, kept between runs in one file per device.

A time of one operation depends on the device, on torch, on the number of threads and on every size
and stride of its arguments, and on nothing else: that is the key. The file is plain JSON; writing
it again keeps what another process has added meanwhile.
"""

from __future__ import annotations

import json
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from chanprune_ext.analysis.calls import tensors_in
from chanprune_ext.analysis.stand_ins import substitute
from chanprune_ext.atomic_files import write_text
from chanprune_ext.devices import device_name, synchroniser
from chanprune_ext.errors import CheckpointError, OutputError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

__all__ = ["LatencyTable", "TimedCall", "cache_folder", "default_table"]

_FORMAT = "chanprune-latency-table"
_VERSION = 1
_LEAST_SAMPLES = 5
_MOST_SAMPLES = 50
GROUPS_POSITION = 6  # of `groups` among the arguments of every convolution
_ENOUGH_MS = 10.0  # samples of one entry stop here, once there are the fewest


@dataclass(frozen=True, eq=False)
class TimedCall:
    """One torch-level call, to be made again on tensors of other shapes.

    Attributes:
        name: Low-level name, such as ``"conv2d"``.
        func: What was called.
        args: Positional arguments, their tensors on the meta device.
        kwargs: Keyword arguments, likewise.
        device: Where it runs.
    """

    name: str
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    device: torch.device

    @classmethod
    def recorded(
        cls, name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> TimedCall:
        """A call as it was made, without its values."""
        device = tensors_in((args, kwargs))[0].device
        bare_args, bare_kwargs = substitute((args, dict(kwargs)), _bare)
        return cls(name, func, bare_args, bare_kwargs, device)

    def tensors(self) -> list[Tensor]:
        """The tensors among its arguments, in order."""
        return tensors_in((self.args, self.kwargs))

    def reshaped(self, shapes: Sequence[Sequence[int]], groups: int | None = None) -> TimedCall:
        """The call with tensors of other shapes, and for a convolution other groups."""
        remaining = iter(shapes)
        args, kwargs = substitute(
            (self.args, dict(self.kwargs)), lambda t: _bare(t, tuple(next(remaining)))
        )
        if groups is not None and "groups" in kwargs:
            kwargs = {**kwargs, "groups": groups}
        elif groups is not None and len(args) > GROUPS_POSITION:
            args = (*args[:GROUPS_POSITION], groups, *args[GROUPS_POSITION + 1 :])
        return TimedCall(self.name, self.func, args, kwargs, self.device)

    def run_time(self) -> float:
        """Milliseconds: the fastest of a few runs."""
        synchronise = synchroniser(self.device)
        samples: list[float] = []
        with torch.inference_mode():
            args, kwargs = substitute((self.args, dict(self.kwargs)), self._filled)
            self.func(*args, **kwargs)
            while len(samples) < _LEAST_SAMPLES or (
                len(samples) < _MOST_SAMPLES and sum(samples) < _ENOUGH_MS
            ):
                synchronise()
                start = time.perf_counter()
                self.func(*args, **kwargs)
                synchronise()
                samples.append((time.perf_counter() - start) * 1e3)
        return min(samples)

    def _filled(self, tensor: Tensor) -> Tensor:
        """A tensor of its shape and layout; of ordinary numbers, as odd ones take odd times."""
        real = torch.empty_like(tensor, device=self.device)
        return real.uniform_(-1, 1) if real.is_floating_point() else real.zero_()

    def key(self) -> str:
        """All that its time depends on, but for the device."""
        described = substitute([list(self.args), dict(self.kwargs)], _tensor_key)
        return json.dumps([self.name, torch.get_num_threads(), described], default=str)


def _tensor_key(tensor: Tensor) -> list[Any]:
    kind = str(tensor.dtype).removeprefix("torch.")
    return [kind, list(tensor.shape), _layout(tensor)]


def _layout(tensor: Tensor) -> str:
    for layout in (torch.channels_last, torch.channels_last_3d):
        fits = tensor.dim() == (4 if layout is torch.channels_last else 5)
        # A tensor with one channel or one pixel is both; it is then called by the plain name.
        if fits and tensor.is_contiguous(memory_format=layout) and not tensor.is_contiguous():
            return "channels_last"
    return "contiguous"


class LatencyTable:
    """Milliseconds of single calls on one device, measured when first asked for.

    Args:
        path: The JSON file; read where it exists. None keeps nothing between runs.
        device: Where the calls run.

    Raises:
        CheckpointError: The file is no table, or one of another device or torch version.
    """

    def __init__(self, path: str | os.PathLike[str] | None, device: torch.device) -> None:
        self.path = None if path is None else Path(path)
        self.device = device
        self.measured = 0
        self._entries = self._read()
        self._fresh: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def milliseconds(self, call: TimedCall) -> float:
        """Time of one call: the fastest of a few, which interruptions can't touch."""
        key = call.key()
        found = self._entries.get(key)
        if found is None:
            found = call.run_time()
            self._entries[key] = self._fresh[key] = found
            self.measured += 1
        return found

    def save(self) -> None:
        """Writes what was measured, beside what the file holds by now.

        Raises:
            OutputError: The file can't be written; it is as it was.
        """
        if self.path is None or not self._fresh:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"{self.path.parent}: can't be made a folder for latency tables "
                f"({error.strerror}); give Budget(latency_table=...) or set CHANPRUNE_CACHE"
            ) from error
        self._entries = {**self._read(), **self._entries}
        data = {**self._identity(), "milliseconds": self._entries}
        write_text(self.path, json.dumps(data, indent=0) + "\n")
        self._fresh.clear()

    def _identity(self) -> dict[str, Any]:
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "device": device_name(self.device),
            "torch": torch.__version__,
        }

    def _read(self) -> dict[str, float]:
        if self.path is None or not self.path.exists():
            return {}
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
            for field, expected in self._identity().items():
                if data[field] != expected:
                    raise CheckpointError(
                        f"{self.path}: its {field} is {data[field]!r}, here it is {expected!r}; "
                        "times do not carry over, give another file"
                    )
            return {str(key): float(value) for key, value in data["milliseconds"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"{self.path}: can't be read as a latency table ({type(error).__name__}: {error}); "
                "remove it or give another file"
            ) from error


def cache_folder() -> Path:
    """``$CHANPRUNE_CACHE``, or ``chanprune_ext`` in the user's cache folder."""
    given = os.environ.get("CHANPRUNE_CACHE")
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "chanprune_ext"


def default_table(device: torch.device) -> Path:
    """The table of a device and this torch in the cache folder."""
    name = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    return cache_folder() / "latency" / f"{name}-torch-{torch.__version__}.json"


def _bare(tensor: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
    """A tensor without values, of the same dtype and layout."""
    size = tuple(tensor.shape) if shape is None else shape
    bare = torch.empty(size, dtype=tensor.dtype, device="meta")
    if _layout(tensor) == "channels_last":
        last = torch.channels_last if len(size) == 4 else torch.channels_last_3d
        bare = bare.to(memory_format=last)
    return bare
