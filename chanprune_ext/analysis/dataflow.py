"""Whether two forwards of one model do the same thing, however long it takes to follow one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chanprune_ext.analysis.calls import tensors_in
from chanprune_ext.analysis.meta_kernels import MetaCalls

if TYPE_CHECKING:
    from torch import Tensor

    from chanprune_ext.analysis.module_path import ModulePath

__all__ = ["Dataflow", "DataflowMode"]

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
        self._alive: list[Tensor] = []

    def _number(self, tensor: Tensor) -> int:
        number = self._numbers.get(id(tensor))
        if number is None:
            number = self._numbers[id(tensor)] = len(self._alive)
            self._alive.append(tensor)
        return number

    def note(self, name: str, module: str, args: Any, kwargs: Any, output: Any) -> None:
        """Record a call that has run."""
        results = tensors_in(output)
        # A batch norm counts its batches, in training mode only.
        if not any(t.is_floating_point() for t in results):
            return
        read = [self._number(t) for t in tensors_in((args, kwargs))]
        if name in _DROPOUTS:
            self._alive.extend(results)
            self._numbers.update((id(t), read[0]) for t in results)
            return
        made = [(self._number(t), tuple(t.shape)) for t in results]
        self.steps.append((name, module, tuple(read), tuple(made)))


class DataflowMode(MetaCalls):
    """Records the dataflow of a forward and does nothing else."""

    def __init__(self, path: ModulePath) -> None:
        super().__init__()
        self.path = path
        self.flow = Dataflow()

    def after(
        self, index: int, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Record a call that has run."""
        self.flow.note(name, self.path.current, args, kwargs, output)
        return output
