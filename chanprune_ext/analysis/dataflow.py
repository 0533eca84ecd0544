"""Whether two forwards of one model do the same thing, however long it takes to follow one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chanprune_ext.analysis.calls import tensors_in
from chanprune_ext.analysis.meta_calls import MetaCalls

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from chanprune_ext.analysis.module_path import ModulePath

__all__ = ["Dataflow", "DataflowMode"]

# Calls that make a tensor of nothing, or of another one's dtype only.
_CREATIONS = frozenset(
    {
        *("empty", "rand", "randn", "zeros", "ones", "full", "new_empty", "new_zeros", "new_ones"),
        *("new_full", "empty_like", "rand_like", "randn_like", "zeros_like", "ones_like"),
    }
)
# Calls that give back in one mode what they change at random in the other.
_DROPOUTS = frozenset(
    {
        *("dropout", "dropout_", "alpha_dropout", "alpha_dropout_", "feature_dropout"),
        *("feature_dropout_", "feature_alpha_dropout", "feature_alpha_dropout_"),
    }
)


class Dataflow:
    """The calls of a forward: which of them read what which of them made, and of what shape."""

    def __init__(self) -> None:
        self.steps: list[tuple[Any, ...]] = []
        self._numbers: dict[int, int] = {}
        self._next = 0
        self._alive: list[Tensor] = []
        self._noise: set[int] = set()

    def _number(self, tensor: Tensor) -> int:
        number = self._numbers.get(id(tensor))
        if number is None:
            number = self._numbers[id(tensor)] = self._next
            self._next += 1
            self._alive.append(tensor)
        return number

    def note(self, name: str, module: str, args: Any, kwargs: Any, output: Any) -> None:
        """Record a call that has run."""
        results = tensors_in(output)
        # A batch norm counts its batches, in training mode only.
        if not any(t.is_floating_point() for t in results):
            return
        given = tensors_in((args, kwargs))
        if name in _CREATIONS or (given and all(id(t) in self._noise for t in given)):
            self._alive.extend(results)
            self._noise.update(map(id, results))
            return
        if name in _DROPOUTS or self._drops_samples(name, given):
            number = self._number(given[0])
            self._alive.extend(results)
            self._numbers.update((id(t), number) for t in results)
            return
        read = [self._number(t) for t in given]
        made = [(self._number(t), tuple(t.shape)) for t in results]
        self.steps.append((name, module, tuple(read), tuple(made)))

    def _drops_samples(self, name: str, given: list[Tensor]) -> bool:
        """Whether whole samples are multiplied by noise: stochastic depth, by another name."""
        if name.strip("_") not in ("mul", "div") or len(given) != 2:
            return False
        values, factor = given
        return (
            id(factor) in self._noise
            and id(values) not in self._noise
            and factor.dim() > 0
            and factor.numel() == factor.shape[0] == values.shape[0]
        )


class DataflowMode(MetaCalls):
    """Records the dataflow of a forward and does nothing else."""

    def __init__(self, path: ModulePath, device: torch.device | None = None) -> None:
        super().__init__(device)
        self.path = path
        self.flow = Dataflow()

    def after(
        self, index: int, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Record a call that has run."""
        self.flow.note(name, self.path.current, args, kwargs, output)
        return output
