"""One small forward that notes how every call is made and what it keeps alive."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..analysis.calls import CallMode, tensors_in
from .outputs import forward

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Activation", "CallFacts", "Survey", "survey_calls"]


@dataclass(frozen=True)
class Activation:
    """Stands in the arguments of a call for a tensor that is no parameter or buffer."""

    shape: tuple[int, ...]


@dataclass(frozen=True)
class CallFacts:
    """How one call was made.

    Attributes:
        name: Low-level name.
        args: Positional arguments; activations replaced by :class:`Activation`.
        kwargs: Keyword arguments, likewise.
        output_shape: Shape of the (first) output, None if there is none.
        alive: Bytes of activations alive after the call.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output_shape: tuple[int, ...] | None
    alive: int

    @property
    def drops(self) -> bool:
        """Whether this, a call of dropout, is active."""
        return bool(self.args[2] if len(self.args) > 2 else self.kwargs.get("train", False))


@dataclass
class Survey:
    """The calls of a forward.

    Attributes:
        calls: In order.
        entries: ``id`` of a parameter or buffer -> its first state-dict entry.
        output: What the model returned.
    """

    calls: list[CallFacts] = field(default_factory=list)
    entries: dict[int, str] = field(default_factory=dict)
    output: Any = None


class _SurveyMode(CallMode):
    def __init__(self, survey: Survey) -> None:
        super().__init__()
        self._survey = survey
        self._storages: dict[int, tuple[list[weakref.ref[Tensor]], int]] = {}

    def after(
        self, _: int, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        made = tensors_in(output)
        self._survey.calls.append(
            CallFacts(
                name=name,
                args=tuple(self._digest(a) for a in args),
                kwargs={key: self._digest(a) for key, a in kwargs.items()},
                output_shape=tuple(made[0].shape) if made else None,
                alive=self._alive(made),
            )
        )
        return output

    def _digest(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            known = id(value) in self._survey.entries
            return value if known else Activation(tuple(value.shape))
        if isinstance(value, (tuple, list)):
            return tuple(self._digest(item) for item in value)
        return value

    def _alive(self, made: list[Tensor]) -> int:
        for tensor in made:
            if id(tensor) in self._survey.entries:
                continue
            storage = tensor.untyped_storage()
            references, _ = self._storages.get(storage.data_ptr(), ([], 0))
            references.append(weakref.ref(tensor))
            self._storages[storage.data_ptr()] = (references, storage.nbytes())
        self._storages = {
            address: (references, size)
            for address, (references, size) in self._storages.items()
            if any(reference() is not None for reference in references)
        }
        return sum(size for _, size in self._storages.values())


def survey_calls(model: nn.Module, inputs: Any) -> Survey:
    """Runs ``model`` once and notes its calls.

    Args:
        model: Network, in eval mode already.
        inputs: As for ``record_calls``.
    """
    survey = Survey()
    for entry, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor):
            survey.entries.setdefault(id(tensor), entry)
    with torch.no_grad(), _SurveyMode(survey):
        survey.output = forward(model, inputs)
    return survey
