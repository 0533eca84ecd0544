"""Example inputs for models on the command line: as asked for, or what the family takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from chanprune_ext.cli.model_spec import parse_shape
from chanprune_ext.errors import InvalidArgumentError
from chanprune_ext.models import CIFAR_RESNETS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

__all__ = ["example_inputs"]

_TOKENS = (1, 16)
# transformers: main input -> shape, where the configuration does not say more.
_SOUND = {"input_values": (1, 16000)}


def example_inputs(spec: str, model: nn.Module, given: Sequence[str]) -> Any:
    """Inputs of zeros that a model takes, on its device.

    Args:
        spec: The specification that ``model`` was built from.
        model: The model.
        given: Shapes such as ``1x3x224x224``, one for each positional input; ``1x16:int64`` for
            another dtype than float32. Empty for what models of this family usually take.

    Returns:
        A tuple of positional inputs, or a dict of keyword inputs.

    Raises:
        InvalidArgumentError: A shape cannot be read, or is needed.
    """
    device = next((t.device for t in model.parameters()), torch.device("cpu"))
    with device:
        family, colon, name = spec.partition(":")
        if family == "hf" and colon:
            return _named_inputs(model, given)
        if given:
            return tuple(_zeros(text) for text in given)
        if family == "torchvision" and colon:
            return _torchvision_inputs(name)
        if family == "timm" and colon:
            return (torch.zeros(1, *_timm_size(model)),)
        if spec in CIFAR_RESNETS:
            return (torch.zeros(1, 3, 32, 32),)
    raise InvalidArgumentError(
        f"--input: needed for {spec!r}; give the shape of each input, like 1x3x224x224 or "
        "1x16:int64"
    )


def _zeros(text: str, dtype: torch.dtype = torch.float32) -> Tensor:
    shape, colon, name = text.partition(":")
    if colon:
        found = getattr(torch, name, None)
        if not isinstance(found, torch.dtype):
            raise InvalidArgumentError(
                f"--input: expected a torch dtype after the ':', like int64, got {name!r} in "
                f"{text!r}"
            )
        dtype = found
    return torch.zeros(parse_shape(shape), dtype=dtype)


def _timm_size(model: Any) -> tuple[int, ...]:
    size: tuple[int, ...] = model.pretrained_cfg["input_size"]
    return size


def _torchvision_inputs(name: str) -> tuple[Any, ...]:
    import torchvision

    place = torchvision.models.get_model_builder(name).__module__
    if ".detection." in place:
        # A list of images of any size; small, since shapes here depend on values.
        return ([torch.zeros(3, 320, 320)],)
    if ".video." in place:
        return (torch.zeros(1, 3, 16, 224, 224),)
    if ".optical_flow." in place:
        return torch.zeros(1, 3, 128, 128), torch.zeros(1, 3, 128, 128)
    side = 299 if name == "inception_v3" else 224
    return (torch.zeros(1, 3, side, side),)


def _named_inputs(model: Any, given: Sequence[str]) -> dict[str, Tensor]:
    """Inputs of a transformers model: its main one, and what goes with it."""
    config, main = model.config, model.main_input_name
    if len(given) > 1:
        raise InvalidArgumentError(
            f"--input: expected the shape of {main!r} alone for an 'hf:' model, got {len(given)}"
        )
    whole = torch.int64 if main == "input_ids" else torch.float32
    if given:
        inputs = {main: _zeros(given[0], whole)}
    elif main == "pixel_values":
        inputs = {main: _image(config)}
    elif main == "input_features":
        frames = 2 * getattr(config, "max_source_positions", 1500)
        inputs = {main: torch.zeros(1, getattr(config, "num_mel_bins", 80), frames)}
    else:
        inputs = {main: torch.zeros(_SOUND.get(main, _TOKENS), dtype=whole)}
    if main == "input_ids" and hasattr(config, "vision_config"):
        inputs["pixel_values"] = _image(config.vision_config)
    if getattr(config, "is_encoder_decoder", False) and main != "pixel_values":
        inputs["decoder_input_ids"] = torch.zeros(_TOKENS, dtype=torch.int64)
    return inputs


def _image(config: Any) -> Tensor:
    size = getattr(config, "image_size", None) or 224
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return torch.zeros(1, getattr(config, "num_channels", None) or 3, height, width)
