"""Which module of a model is running."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn
from typing_extensions import Self

from chanprune_ext.module_tree import modules_of

__all__ = ["ModulePath"]


class ModulePath:
    """The dotted path of the module that is running, kept by global forward hooks."""

    def __init__(self, model: nn.Module) -> None:
        self._names = {id(module): name for name, module in modules_of(model)}
        self._stack: list[str] = []
        self._handles: list[Any] = []
        self._failed: str | None = None

    @property
    def current(self) -> str:
        """The innermost module that is running; "" is the root."""
        return self._stack[-1] if self._stack else ""

    @property
    def failed(self) -> str:
        """The innermost module of an error that is on its way out of the model."""
        return self.current if self._failed is None else self._failed

    def __enter__(self) -> Self:
        hooks = torch.nn.modules.module
        self._handles = [
            hooks.register_module_forward_pre_hook(self._push),
            hooks.register_module_forward_hook(self._pop, always_call=True),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _push(self, module: nn.Module, _: Any) -> None:
        # A module made inside a forward is not in the table: it runs under its parent's name.
        self._stack.append(self._names.get(id(module), self.current))

    def _pop(self, *_: Any) -> None:
        # Torch calls this inside its `except` clause when the module's forward has raised.
        raised = sys.exc_info()[0] is not None
        if self._stack:
            left = self._stack.pop()
            if not raised:
                self._failed = None
            elif self._failed is None:
                self._failed = left
