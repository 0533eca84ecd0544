"""Every error a user of the package can meet, each also an instance of the built-in it refines."""

from __future__ import annotations

__all__ = [
    "AnalysisError",
    "BudgetError",
    "ChanpruneError",
    "CheckpointError",
    "DataError",
    "ExportError",
    "InvalidArgumentError",
    "NativeModuleError",
    "NothingToPruneError",
    "OutputError",
    "PlanMismatchError",
    "TrainingError",
    "VerificationError",
]


class ChanpruneError(Exception):
    """Base of all errors raised on purpose by chanprune_ext."""


class InvalidArgumentError(ChanpruneError, ValueError):
    """An argument is outside what the function accepts; nothing was changed."""


class BudgetError(InvalidArgumentError):
    """A budget cannot be met with what may be removed."""


class AnalysisError(ChanpruneError, RuntimeError):
    """The model could not be traced, for example because its forward raised."""


class NothingToPruneError(ChanpruneError, ValueError):
    """No channel of the model may be removed under the given options."""


class PlanMismatchError(ChanpruneError, ValueError):
    """A plan was made for a model of another structure."""


class VerificationError(ChanpruneError, RuntimeError):
    """The pruned model did not behave as predicted and was discarded."""


class CheckpointError(ChanpruneError, ValueError):
    """A file is truncated, foreign, or does not belong to the given model."""


class DataError(ChanpruneError, ValueError):
    """A dataset cannot be read or contains values outside their range."""


class ExportError(ChanpruneError, RuntimeError):
    """A model can't be written in another format, or the result computes something else."""


class OutputError(ChanpruneError, OSError):
    """A result could not be written; no partial file is left behind."""


class TrainingError(ChanpruneError, RuntimeError):
    """Recovery could not continue, for example because the loss is not finite."""


class NativeModuleError(ChanpruneError, ImportError):
    """A compiled module is missing or was built for another Python or torch."""
