"""Evaluation mode for a while."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from chanprune_ext.module_tree import modules_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

__all__ = ["evaluating", "without_cache"]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts every module into evaluation mode, and on exit each back into its own mode."""
    modes = [(module, module.training) for _, module in modules_of(model)]
    for module, mode in modes:
        # Not `model.eval()`: a model may override it, to keep parts training, say.
        if mode:
            module.training = False
    try:
        yield
    finally:
        for module, mode in modes:
            if module.training != mode:
                module.training = mode


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Keeps a model of transformers from returning its cache of keys and values."""
    config: Any = getattr(model, "config", None)
    before = getattr(config, "use_cache", None)
    if not before:
        yield
        return
    config.use_cache = False
    try:
        yield
    finally:
        config.use_cache = before
