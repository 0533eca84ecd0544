"""Calibration inputs: read once, labels dropped, a part held back to judge by."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..analysis.calls import tensors_in
from ..errors import InvalidArgumentError

__all__ = ["Calibration", "first_samples", "read_batches", "sample_count", "split_batches"]


@dataclass(frozen=True)
class Calibration:
    """Inputs on the networks' device.

    Attributes:
        fit: Batches to fit on.
        held_back: Batches to judge by.
    """

    fit: tuple[Any, ...]
    held_back: tuple[Any, ...]

    @property
    def fit_samples(self) -> int:
        """Number of samples in ``fit``."""
        return sum(sample_count(batch) for batch in self.fit)

    @property
    def held_back_samples(self) -> int:
        """Number of samples in ``held_back``."""
        return sum(sample_count(batch) for batch in self.held_back)


def sample_count(inputs: Any) -> int:
    """Number of samples in one batch of inputs."""
    tensors = tensors_in(inputs)
    return tensors[0].shape[0] if tensors and tensors[0].ndim else 1


def _map(inputs: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(inputs, Tensor):
        return change(inputs)
    if isinstance(inputs, Mapping):
        return {key: _map(item, change) for key, item in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return tuple(_map(item, change) for item in inputs)
    return inputs


def _most_positional(model: nn.Module) -> tuple[int, int]:
    """How many positional inputs ``model`` needs, and how many it takes."""
    needed = most = 0
    for parameter in inspect.signature(model.forward).parameters.values():
        if parameter.kind == parameter.VAR_POSITIONAL:
            return needed, 1 << 30
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            most += 1
            needed += parameter.default is parameter.empty
    return needed, most


def _without_label(item: Any, needed: int, most: int) -> Any:
    if not isinstance(item, (tuple, list)):
        return item
    if len(item) == 2 and needed < 2:
        label = item[1]
        looks_like_label = not isinstance(label, Tensor) or (
            label.ndim <= 1 and not label.is_floating_point()
        )
        if most < 2 or looks_like_label:
            return item[0]
    return item[0] if len(item) == 1 else tuple(item)


def _checked(inputs: Any, index: int) -> Any:
    tensors = tensors_in(inputs)
    if not tensors:
        raise InvalidArgumentError(
            f"batches: expected tensors, or pairs (input, label), but batch {index} is "
            f"{type(inputs).__name__}"
        )
    for tensor in tensors:
        if tensor.numel() == 0:
            raise InvalidArgumentError(f"batches: batch {index} is empty ({list(tensor.shape)})")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InvalidArgumentError(
                f"batches: batch {index} contains NaN or infinity; clean the calibration data"
            )
    return inputs


def _form(inputs: Any) -> Any:
    """Batches of equal form can be put together along axis 0; None if this one can't be cut."""
    tensors = tensors_in(inputs)
    sizes = {tensor.shape[0] if tensor.ndim else -1 for tensor in tensors}
    if len(sizes) != 1 or -1 in sizes:
        return None
    if isinstance(inputs, Tensor):
        keys: Any = "tensor"
    elif isinstance(inputs, Mapping):
        keys = tuple(inputs)
        if not all(isinstance(item, Tensor) for item in inputs.values()):
            return None
    else:
        keys = len(inputs)
        if not all(isinstance(item, Tensor) for item in inputs):
            return None
    return keys, tuple((tensor.shape[1:], tensor.dtype) for tensor in tensors)


def _joined(items: list[Any]) -> Any:
    first = items[0]
    if isinstance(first, Tensor):
        return torch.cat(items)
    if isinstance(first, Mapping):
        return {key: torch.cat([item[key] for item in items]) for key in first}
    return tuple(torch.cat(parts) for parts in zip(*items, strict=True))


def first_samples(batch: Any, count: int) -> Any:
    """The first samples of a batch, or all of it if it can't be cut."""
    return batch if _form(batch) is None else _map(batch, lambda t: t[:count])


def read_batches(batches: Any, model: nn.Module, *, device: torch.device) -> list[Any]:
    """Reads calibration batches, drops labels and moves the inputs to ``device``.

    Args:
        batches: One tensor, or an iterable of inputs: tensors, tuples of positional inputs, dicts
            of keyword inputs, or pairs of an input and a label, which is ignored.
        model: Network the inputs are for; its signature tells a pair from two inputs.
        device: Where the inputs are moved to.

    Raises:
        InvalidArgumentError: there is no batch, or one that is empty, not finite or no tensor.
    """
    if isinstance(batches, (Tensor, Mapping)):
        batches = [batches]
    if not isinstance(batches, Iterable):
        raise InvalidArgumentError(
            f"batches: expected a tensor or an iterable of inputs, got {type(batches).__name__}"
        )
    needed, most = _most_positional(model)
    items = [
        _map(_checked(_without_label(item, needed, most), i), lambda t: t.detach().to(device))
        for i, item in enumerate(batches)
    ]
    if not items:
        raise InvalidArgumentError("batches: expected at least one batch, got none")
    return items


def split_batches(items: list[Any], *, held_back: float, batch_size: int) -> Calibration:
    """Splits the samples into a part to fit on and a part to judge by.

    Batches of equal form are put together and cut anew, so that any share of the samples can be
    held back, evenly spread: every tenth one, say, and not the last tenth, which might be of one
    class. Where that is not possible, whole batches are held back.

    Args:
        items: Batches as :func:`read_batches` returns them.
        held_back: Share of the samples to judge by, in [0, 1). At least one sample is held back
            if there are two, unless it is 0.
        batch_size: Most samples of a batch that was put together.
    """
    if len({str(_form(item)) for item in items}) > 1 or _form(items[0]) is None:
        chosen = _spread(len(items), held_back)
        return Calibration(
            tuple(item for i, item in enumerate(items) if i not in chosen),
            tuple(item for i, item in enumerate(items) if i in chosen),
        )
    whole = _joined(items)
    total = sample_count(whole)
    chosen = _spread(total, held_back)

    def part(samples: list[int]) -> tuple[Any, ...]:
        index = torch.tensor(samples, dtype=torch.long, device="cpu")
        pieces = index.tensor_split(-(-len(samples) // batch_size))
        return tuple(_selected(whole, piece) for piece in pieces)

    judged = sorted(chosen)
    return Calibration(
        part([i for i in range(total) if i not in chosen]), part(judged) if judged else ()
    )


def _selected(inputs: Any, samples: Tensor) -> Any:
    return _map(inputs, lambda t: t.index_select(0, samples.to(t.device)))


def _spread(total: int, share: float) -> set[int]:
    count = min(total - 1, max(1, round(share * total))) if share else 0
    return {int((i + 0.5) * total / count) for i in range(count)}
