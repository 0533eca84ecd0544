"""Calibration inputs: read once, labels dropped, a part held back to judge by."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..analysis.calls import run_model, steady_calls, tensors_in
from ..errors import InvalidArgumentError

__all__ = [
    "Calibration",
    "ReadBatches",
    "first_samples",
    "read_batches",
    "sample_count",
    "split_batches",
]


class ReadBatches(list[Any]):
    """Batches without their labels, which :func:`read_batches` need not look for again."""


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


@dataclass(frozen=True)
class _Signature:
    """How many positional tensors a model needs and may take, and the names of all inputs."""

    needed: int
    most: float
    names: frozenset[str]


def _signature(model: nn.Module) -> _Signature:
    parameters = inspect.signature(model.forward).parameters
    positional = [p for p in parameters.values() if p.kind <= p.POSITIONAL_OR_KEYWORD]
    any_number = any(p.kind == p.VAR_POSITIONAL for p in parameters.values())
    # What is a number or a flag unless told otherwise (`features=False`) is no tensor.
    options = [i for i, p in enumerate(positional) if isinstance(p.default, (int, float, str))]
    most = float("inf") if any_number else len(positional)
    return _Signature(
        needed=sum(p.default is p.empty for p in positional),
        most=min([most, *options]),
        names=frozenset(parameters),
    )


def _without_label(item: Any, signature: _Signature, inputs: Any) -> Any:
    if not isinstance(item, (tuple, list)):
        return item
    if len(item) == 2 and inputs is not None:
        if _is_like(item, inputs):
            return tuple(item)
        if _is_like(item[0], inputs):
            return item[0]
    if len(item) == 2 and isinstance(item[0], Mapping):
        # Keyword inputs have no further one beside them, unless the model itself takes a dict.
        if signature.needed < 2 or signature.names >= item[0].keys():
            return item[0]
    elif len(item) == 2 and signature.needed < 2:
        label = item[1]
        looks_like_label = not isinstance(label, Tensor) or (
            label.ndim <= 1 and not label.is_floating_point()
        )
        if signature.most < 2 or looks_like_label:
            return item[0]
    return item[0] if len(item) == 1 else tuple(item)


def _is_like(item: Any, inputs: Any) -> bool:
    """Whether an input is nested as those that a plan was made with."""
    kind, parts = next(iter(inputs.items()))
    if kind == "dict":
        return isinstance(item, Mapping)
    if kind in ("tuple", "list"):
        if len(parts) == 1 and not isinstance(item, (tuple, list)):
            return _is_like(item, parts[0])  # one positional input may come without its tuple
        return (
            isinstance(item, (tuple, list))
            and len(item) == len(parts)
            and all(map(_is_like, item, parts))
        )
    return isinstance(item, Tensor) == (kind == "shape")


def _checked(inputs: Any, index: int) -> Any:
    tensors = tensors_in(inputs)
    if not tensors:
        raise InvalidArgumentError(
            f"batches: expected tensors, or pairs (input, label), but batch {index} is "
            f"{type(inputs).__name__}"
        )
    for position, tensor in enumerate(tensors):
        if tensor.numel() == 0:
            raise InvalidArgumentError(f"batches: batch {index} is empty ({list(tensor.shape)})")
        if not tensor.is_floating_point():
            continue
        # Beside the data there may be a mask, which hides by minus infinity.
        sound = ~tensor.isnan() if position else tensor.isfinite()
        if not bool(sound.all()):
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


def first_samples(batch: Any, count: int, model: nn.Module) -> Any:
    """The first samples of a batch, or all of it if it can't be cut for ``model``."""
    if _form(batch) is None:
        return batch
    few = _map(batch, lambda t: t[:count])
    return few if _is_accepted(few, model) else batch


def _is_accepted(piece: Any, model: nn.Module) -> bool:
    """Whether ``model`` runs on a part of a batch.

    Of several tensors the first axes may agree by chance: a mask has as many rows as a sequence
    has positions.
    """
    if len(tensors_in(piece)) < 2:
        return True
    try:
        with steady_calls(model):
            run_model(model, piece)
    except Exception:  # noqa: BLE001 - a forward may raise anything on what does not fit
        return False
    return True


def read_batches(
    batches: Any, model: nn.Module, *, device: torch.device, inputs: Any = None
) -> ReadBatches:
    """Reads calibration batches, drops labels and moves the inputs to ``device``.

    Args:
        batches: One tensor, or an iterable of inputs: tensors, tuples of positional inputs, dicts
            of keyword inputs, or pairs of an input and a label, which is ignored.
        model: Network the inputs are for; its signature tells a pair from two inputs. Where it
            may take two and needs one, a tensor beside a tensor is a label if it holds integers,
            one a sample; what is beside a dict is always a label.
        device: Where the inputs are moved to.
        inputs: :attr:`chanprune_ext.PruningPlan.inputs` of a plan for the model, where there is
            one: what is nested as these are is no pair.

    Raises:
        InvalidArgumentError: there is no batch, or one that is empty, not finite or no tensor.
    """
    if isinstance(batches, ReadBatches):
        return ReadBatches(_map(item, lambda t: t.to(device)) for item in batches)
    if isinstance(batches, (Tensor, Mapping)):
        batches = [batches]
    if not isinstance(batches, Iterable):
        raise InvalidArgumentError(
            f"batches: expected a tensor or an iterable of inputs, got {type(batches).__name__}"
        )
    signature = _signature(model)
    items = ReadBatches(
        _map(_checked(_without_label(item, signature, inputs), i), lambda t: t.detach().to(device))
        for i, item in enumerate(batches)
    )
    if not items:
        raise InvalidArgumentError("batches: expected at least one batch, got none")
    return items


def split_batches(
    items: list[Any], model: nn.Module, *, held_back: float, batch_size: int
) -> Calibration:
    """Splits the samples into a part to fit on and a part to judge by.

    Batches of equal form are put together and cut anew, so that any share of the samples can be
    held back, evenly spread: every tenth one, say, and not the last tenth, which might be of one
    class. Where that is not possible, whole batches are held back.

    Args:
        items: Batches as :func:`read_batches` returns them.
        model: Network the inputs are for: where it does not run on parts of them, they stay whole.
        held_back: Share of the samples to judge by, in [0, 1). At least one sample is held back
            if there are two, unless it is 0.
        batch_size: Most samples of a batch that was put together.
    """
    alike = len({str(_form(item)) for item in items}) == 1 and _form(items[0]) is not None
    cut = _cut_anew(items, held_back, batch_size) if alike else None
    if cut is not None and _is_accepted(cut.fit[0], model):
        return cut
    chosen = _spread(len(items), held_back)
    return Calibration(
        tuple(item for i, item in enumerate(items) if i not in chosen),
        tuple(item for i, item in enumerate(items) if i in chosen),
    )


def _cut_anew(items: list[Any], held_back: float, batch_size: int) -> Calibration:
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
