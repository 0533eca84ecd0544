"""Training a pruned network back to accuracy, and measuring what it reached."""

from .evaluation import Evaluation, evaluate
from .fine_tuning import recover
from .recipe import Recipe
from .result import EpochRecord, RecoveryResult

__all__ = ["EpochRecord", "Evaluation", "Recipe", "RecoveryResult", "evaluate", "recover"]
