"""The networks that a compensation may end with, judged side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import InvalidArgumentError
from .batch_norm import measured_batch_norms, reestimate

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from .batches import Calibration
    from .ledger import Ledger
    from .report import Deviation

__all__ = ["Variants"]


class Variants:
    """What the network could be left with, how good each is, and how to get there.

    Args:
        pruned: Network after pruning.
        data: Calibration data.
        deviation: How far the network's outputs are off as it is now.
        ledger: Notes what is changed.

    Attributes:
        deviations: Variant -> its deviation.
    """

    def __init__(
        self,
        pruned: nn.Module,
        data: Calibration,
        deviation: Callable[[], Deviation],
        ledger: Ledger,
    ) -> None:
        self._pruned = pruned
        self._data = data
        self._deviation = deviation
        self._ledger = ledger
        self._batch_norm: list[tuple[Tensor, Tensor]] = []
        self.deviations: dict[str, Deviation] = {}
        self.measure("plain")

    def measure(self, name: str) -> None:
        """Notes the deviation of the network as it is now."""
        self.deviations[name] = self._deviation()

    def try_batch_norm(self, *, required: bool) -> None:
        """Measures what re-estimated batch-norm statistics give, and takes them back."""
        norms = measured_batch_norms(self._pruned)
        if not norms:
            if required:
                raise InvalidArgumentError(
                    'method: "batch_norm" needs batch norms with running statistics, and pruned '
                    'has none; use "least_squares"'
                )
            return
        try:
            reestimate(self._pruned, self._data.fit, self._ledger)
        except ValueError as error:
            self._ledger.restore()
            if required:
                raise InvalidArgumentError(
                    f"batches: too few samples for batch-norm statistics: {error}"
                ) from error
            return
        self.measure("batch_norm")
        statistics = [t for norm in norms for t in (norm.running_mean, norm.running_var)]
        self._batch_norm = [(t, t.clone()) for t in statistics if t is not None]
        self._ledger.restore()

    def settle(self, method: str, *, judged: bool) -> tuple[str, str]:
        """Leaves the network with the best variant; its name and the reason."""
        best = method
        if judged:
            best = "plain"
            for name, deviation in self.deviations.items():
                if deviation.better_than(self.deviations[best]):
                    best = name
            reason = "smallest deviation on the held-back samples"
            if best != method:
                reason += f", {self.deviations[best]}; {method}: {self.deviations[method]}"
        else:
            reason = "asked for, and no samples were held back to judge it"
        if best != "least_squares":
            self._ledger.restore()
        if best == "batch_norm":
            for tensor, value in self._batch_norm:
                tensor.copy_(value)
        return best, reason
