"""Constructors of models that other packages name: torchvision, timm and transformers."""

from __future__ import annotations

import contextlib
import difflib
import importlib
from typing import TYPE_CHECKING, Any

import torch

from chanprune_ext.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import nn

__all__ = ["FAMILIES", "family_constructor"]

FAMILIES = {
    "torchvision": "torchvision:<name>",
    "timm": "timm:<name>",
    "hf": "hf:<model type, folder or organisation/repository>[:<auto class>]",
}


def family_constructor(
    family: str, name: str, *, on_meta: bool = False
) -> Callable[..., nn.Module]:
    """The function that builds a model of one of :data:`FAMILIES`, with fresh weights.

    Args:
        family: A key of :data:`FAMILIES`.
        name: The part of the specification after the first colon.
        on_meta: Build a transformers model without memory for its weights.

    Raises:
        InvalidArgumentError: The family has no such model, or its package is not installed.
    """
    if family == "torchvision":
        return _torchvision(name)
    if family == "timm":
        return _timm(name)
    return _transformers(name, on_meta)


def _torchvision(name: str) -> Callable[..., nn.Module]:
    import torchvision

    known = torchvision.models.list_models()
    if name not in known:
        raise InvalidArgumentError(
            f"MODEL: torchvision has no model named {name!r}{_near(name, known)}; "
            "torchvision.models.list_models() lists those it has"
        )

    def construct(**arguments: Any) -> nn.Module:
        # Some builders would download a trained backbone.
        builder = torchvision.models.get_model_builder(name)
        backbone = {"weights_backbone"} & builder.__annotations__.keys()
        fresh = {"weights": None, **dict.fromkeys(backbone)}
        model: nn.Module = torchvision.models.get_model(name, **{**fresh, **arguments})
        return model

    return construct


def _timm(name: str) -> Callable[..., nn.Module]:
    timm = _package("timm", f"timm:{name}")
    # What follows a dot names trained weights of the same architecture.
    if not timm.is_model(name.partition(".")[0]):
        raise InvalidArgumentError(
            f"MODEL: timm has no model named {name!r}{_near(name, timm.list_models())}; "
            "timm.list_models() lists those it has"
        )

    def construct(**arguments: Any) -> nn.Module:
        model: nn.Module = timm.create_model(name, pretrained=False, **arguments)
        return model

    return construct


def _transformers(name: str, on_meta: bool) -> Callable[..., nn.Module]:
    transformers = _package("transformers", f"hf:{name}")
    name, _, class_name = name.partition(":")
    known = transformers.CONFIG_MAPPING
    if "/" not in name and name not in known:
        raise InvalidArgumentError(
            f"MODEL: transformers has no model type {name!r}{_near(name, known.keys())}; expected "
            "a type such as 'hf:bert', or a folder or repository with a '/' in its name"
        )
    auto: Any = getattr(transformers, class_name or "AutoModel", None)
    if not hasattr(auto, "from_config"):
        raise InvalidArgumentError(
            f"MODEL: transformers has no auto class {class_name!r}; expected one like "
            "'hf:bert:AutoModelForSequenceClassification'"
        )

    def construct(**arguments: Any) -> nn.Module:
        if "/" in name:
            config = transformers.AutoConfig.from_pretrained(name, **arguments)
        else:
            config = transformers.AutoConfig.for_model(name, **arguments)
        # A cache among the outputs would keep all heads as they are.
        config.use_cache = False
        # Where a type has several classes, the first is wanted; without a list there it fails.
        config.architectures = config.architectures or []
        with torch.device("meta") if on_meta else contextlib.nullcontext():
            model: nn.Module = auto.from_config(config)
        return model

    return construct


def _package(name: str, spec: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InvalidArgumentError(
            f"MODEL: {spec!r} needs the package {name} ({error}); install it with "
            "pip install 'chanprune_ext[models]'"
        ) from error


def _near(name: str, known: Iterable[str]) -> str:
    """What may have been meant, as part of a sentence."""
    close = difflib.get_close_matches(name, list(known), n=3)
    return f" (did you mean {', '.join(map(repr, close))}?)" if close else ""
