"""Looking at what chosen modules of a network return, for as long as a loss needs it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from typing_extensions import Self

from ..errors import InvalidArgumentError
from ..module_tree import plain_module

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["FeatureTaps", "plain_module"]


class FeatureTaps:
    """Context manager: keeps the last outputs of some modules of a network until they are taken.

    Forward hooks sit on the modules themselves, which DistributedDataParallel and torch.compile
    leave in place. They are removed on exit, whatever happens, and outputs not taken are dropped.

    Args:
        model (nn.Module): the network, wrapped or not.
        names (Sequence[str]): paths of its modules.

    Raises:
        InvalidArgumentError: the network has no such module.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        modules = dict(plain_module(model).named_modules())
        for name in names:
            if name not in modules:
                raise InvalidArgumentError(f"taps: the network has no module '{name}'")
        self._modules = {name: modules[name] for name in names}
        self._outputs: dict[str, Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_hook(self._keeper(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._outputs.clear()

    def take(self) -> dict[str, Tensor]:
        """What each module returned last; nothing stays here.

        Raises:
            InvalidArgumentError: a module was not called, or returned no tensor.
        """
        outputs, self._outputs = self._outputs, {}
        for name in self._modules:
            if name not in outputs:
                raise InvalidArgumentError(
                    f"taps: module '{name}' has not returned a floating-point tensor in this "
                    "forward; choose modules whose output is one"
                )
        return outputs

    def _keeper(self, name: str) -> Any:
        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            # Blocks of transformers return the features first and what else they know after them.
            value = output[0] if isinstance(output, tuple | list) and output else output
            if isinstance(value, Tensor) and value.is_floating_point():
                self._outputs[name] = value

        return keep
