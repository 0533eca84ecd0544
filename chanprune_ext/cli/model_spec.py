"""Models by name on the command line, and the small ``name=value`` grammar of its options."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from chanprune_ext.cli.model_families import FAMILIES, family_constructor
from chanprune_ext.errors import InvalidArgumentError
from chanprune_ext.models import CIFAR_RESNETS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = ["build_model", "parse_arguments", "parse_channels", "parse_ratios", "parse_shape"]


def build_model(
    spec: str, arguments: Mapping[str, Any] | None = None, *, on_meta: bool = False
) -> nn.Module:
    """Builds the model a specification names, with fresh weights.

    Args:
        spec: A CIFAR network of this package (``resnet56``), ``torchvision:<name>``
            (``torchvision:resnet50``), ``timm:<name>``, ``hf:<type or repository>`` (``hf:bert``,
            ``hf:llama:AutoModelForCausalLM``), or ``<module>:<callable>``, where the callable
            returns an ``nn.Module`` and the module may lie in the working directory.
        arguments: Keyword arguments of the constructor, or of the configuration (``hf:``).
        on_meta: Give ``hf:`` models no memory for weights: enough to look at them.

    Raises:
        InvalidArgumentError: No such model, or its constructor refused the arguments.
    """
    constructor = _constructor(spec, on_meta)
    try:
        model = constructor(**(arguments or {}))
    except Exception as error:
        raise InvalidArgumentError(
            f"MODEL: {spec!r} could not be built with {dict(arguments or {})} "
            f"({type(error).__name__}: {error}); pass its arguments as --model-arg name=value"
        ) from error
    if not isinstance(model, nn.Module):
        raise InvalidArgumentError(
            f"MODEL: {spec!r} returned {type(model).__name__}, expected an nn.Module"
        )
    return model


def parse_arguments(pairs: Sequence[str]) -> dict[str, Any]:
    """Reads ``name=value`` pairs; a value that is JSON (``3``, ``true``, ``[1, 2]``) is read so.

    Raises:
        InvalidArgumentError: A pair has no ``=`` or no name.
    """
    values: dict[str, Any] = {}
    for pair in pairs:
        name, value = _split(pair, "--model-arg", "name=value")
        try:
            values[name] = json.loads(value)
        except ValueError:
            values[name] = value
    return values


def parse_ratios(pairs: Sequence[str]) -> dict[str, float]:
    """Reads ``glob=ratio`` pairs, for example ``layer*.conv1=0.5``.

    Raises:
        InvalidArgumentError: A pair has no ``=``, or its ratio is not a number.
    """
    ratios: dict[str, float] = {}
    for pair in pairs:
        glob, value = _split(pair, "--ratios", "glob=ratio")
        try:
            ratios[glob] = float(value)
        except ValueError:
            raise InvalidArgumentError(
                f"--ratios: expected a number after the '=', got {value!r} in {pair!r}"
            ) from None
    return ratios


def parse_channels(pairs: Sequence[str]) -> dict[str, list[int]]:
    """Reads ``module=indices`` pairs, for example ``layer1.0.conv1=0,3,5``; repeated ones add up.

    Raises:
        InvalidArgumentError: A pair has no ``=``, or what follows are no integers.
    """
    channels: dict[str, list[int]] = {}
    for pair in pairs:
        name, indices = _split(pair, "--remove", "module=indices")
        try:
            channels.setdefault(name, []).extend(int(index) for index in indices.split(","))
        except ValueError:
            raise InvalidArgumentError(
                f"--remove: expected integers like 0,3,5 after the '=', got {indices!r} in {pair!r}"
            ) from None
    return channels


def parse_shape(text: str) -> tuple[int, ...]:
    """Reads a shape such as ``1,3,224,224`` or ``1x3x224x224``.

    Raises:
        InvalidArgumentError: Not a list of positive integers.
    """
    parts = text.replace("x", ",").split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise InvalidArgumentError(
            f"--input: expected positive integers like 1,3,224,224, got {text!r}"
        )
    return tuple(int(part) for part in parts)


def _constructor(spec: str, on_meta: bool) -> Callable[..., Any]:
    family, colon, name = spec.partition(":")
    if not colon:
        if spec not in CIFAR_RESNETS and Path(spec).is_file():
            raise InvalidArgumentError(
                f"MODEL: {spec!r} is a file; name the model that it holds, such as resnet20 or "
                "torchvision:resnet18, and give files as --weights; 'chanprune verify' says what "
                "is in one"
            )
        if spec not in CIFAR_RESNETS:
            raise InvalidArgumentError(
                f"MODEL: no model named {spec!r}; expected one of {', '.join(CIFAR_RESNETS)}, "
                f"{', '.join(map(repr, FAMILIES.values()))} or '<module>:<callable>'"
            )
        return CIFAR_RESNETS[spec]
    if family in FAMILIES:
        return family_constructor(family, name, on_meta=on_meta)
    return _imported_constructor(family, name)


def _imported_constructor(module_name: str, name: str) -> Callable[..., Any]:
    # A console script does not have the working directory on its path, unlike `python -m`.
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise InvalidArgumentError(
            f"MODEL: cannot import module {module_name!r} ({type(error).__name__}: {error})"
        ) from error
    constructor = getattr(module, name, None)
    if not callable(constructor):
        raise InvalidArgumentError(f"MODEL: module {module_name!r} has no callable {name!r}")
    found: Callable[..., Any] = constructor
    return found


def _split(pair: str, option: str, form: str) -> tuple[str, str]:
    name, equals, value = pair.partition("=")
    if not equals or not name:
        raise InvalidArgumentError(f"{option}: expected {form}, got {pair!r}")
    return name, value
