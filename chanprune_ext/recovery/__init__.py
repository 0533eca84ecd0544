"""Training a pruned network back to accuracy, and measuring what it reached."""

from .evaluation import Evaluation, evaluate
from .fine_tuning import recover
from .interruption import RecoveryInterrupted
from .progressive import ProgressiveResult, ProgressiveStage, prune_progressively
from .recipe import Recipe
from .result import EpochRecord, RecoveryResult
from .sparsity import sparsify

__all__ = [
    "EpochRecord",
    "Evaluation",
    "ProgressiveResult",
    "ProgressiveStage",
    "Recipe",
    "RecoveryInterrupted",
    "RecoveryResult",
    "evaluate",
    "prune_progressively",
    "recover",
    "sparsify",
]
