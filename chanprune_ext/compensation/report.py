"""What a compensation did, layer by layer and as a whole."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["CompensationReport", "Deviation", "LayerReport"]

_LEAST_GAIN = 1e-4  # relative; less than this is round-off of the measurement


@dataclass(frozen=True)
class Deviation:
    """How far the pruned network's outputs are from the original's.

    Attributes:
        relative_l2: ``|pruned - original| / |original|`` over all outputs.
        kl: Mean ``KL(softmax(original) || softmax(pruned))`` in nats; None where the output is
            no matrix of logits.
    """

    relative_l2: float
    kl: float | None

    def better_than(self, other: Deviation) -> bool:
        """Whether this deviation is clearly smaller: by KL, or else by relative L2."""
        mine, others = (
            (self.relative_l2, other.relative_l2)
            if self.kl is None or other.kl is None
            else (self.kl, other.kl)
        )
        return mine < others * (1 - _LEAST_GAIN) or (
            not math.isfinite(others) and math.isfinite(mine)
        )

    def __str__(self) -> str:
        kl = "" if self.kl is None else f", KL {self.kl:.4g}"
        return f"relative L2 {self.relative_l2:.4g}{kl}"


@dataclass(frozen=True)
class LayerReport:
    """One layer.

    Errors are relative L2 errors at the layer's target, behind the ReLU that follows it, if any:
    on the held-back batches where there are some, else on the batches of the fit.

    Attributes:
        module: Dotted path of the module.
        entry: State-dict entry of its weight.
        kind: Such as ``"conv2d"``.
        target: Module whose call makes the value that is matched.
        rows: Output channels.
        columns: Unknowns per output channel, without the intercept.
        samples: Positions the fit used.
        error_before: Relative error before this layer was fitted; earlier ones were already.
        error_after: Relative error afterwards.
        ridge: Strength of the ridge that was used.
        condition: Estimated condition number of the system.
        rank: Effective number of unknowns per output channel, summed over groups.
        steps: Solves that were kept: the least-squares one and one-sided ones.
        seconds: Wall time.
        skipped: Why the layer was left as it was; None if it was fitted.
    """

    module: str
    entry: str
    kind: str
    target: str
    rows: int
    columns: int
    samples: int = 0
    error_before: float | None = None
    error_after: float | None = None
    ridge: float | None = None
    condition: float | None = None
    rank: float | None = None
    steps: int = 0
    seconds: float = 0.0
    skipped: str | None = None


@dataclass(frozen=True)
class CompensationReport:
    """Result of :func:`chanprune_ext.compensation.compensate`.

    Attributes:
        method: What was asked for: ``"least_squares"`` or ``"batch_norm"``.
        kept: What the network was left with: ``"least_squares"``, ``"batch_norm"`` or ``"plain"``.
        reason: Why, in one sentence.
        images: Calibration samples used for fitting.
        held_back_images: Calibration samples used for judging.
        deviations: Variant -> deviation of its outputs on the held-back samples, or on the
            samples of the fit if none were held back.
        layers: Every layer met, in the order of fitting, then the ones that cannot be fitted.
        seconds: Wall time of the whole.
    """

    method: str
    kept: str
    reason: str
    images: int
    held_back_images: int
    deviations: dict[str, Deviation]
    layers: tuple[LayerReport, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The report as plain dicts, lists, strings and numbers, ready for JSON."""
        plain: dict[str, Any] = _finite(asdict(self))
        return plain

    def __str__(self) -> str:
        fitted = sum(layer.skipped is None for layer in self.layers)
        lines = [
            f"compensation: kept {self.kept} ({self.reason})",
            f"  samples: {self.images} fitted on, {self.held_back_images} held back",
            f"  layers: {fitted} of {len(self.layers)} refitted, {self.seconds:.1f} s",
        ]
        lines += [f"  {name}: {deviation}" for name, deviation in self.deviations.items()]
        return "\n".join(lines)


def _finite(value: Any) -> Any:
    """JSON knows no infinity and no NaN: they become strings."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
