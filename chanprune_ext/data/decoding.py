"""Encoded images to pixels."""

from __future__ import annotations

import io
import struct
import zlib
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["decoded"]

_JPEG = b"\xff\xd8"


def decoded(data: bytes, name: str) -> Tensor:
    """Decodes an image in any format that Pillow reads.

    JPEG goes through torchvision, which takes a fifth less time and gives the same pixels; what it
    refuses goes through Pillow, which knows more kinds and says what is wrong.

    Args:
        data (bytes): the file's content.
        name (str): of the image, for messages.

    Returns:
        Tensor[3, H, W]: uint8 RGB. Strided as the decoder left it, which is NHWC.

    Raises:
        DataError: the bytes are no complete image, or one whose values have no known range.
    """
    if data[:2] == _JPEG:
        try:
            from torchvision.io import ImageReadMode, decode_jpeg

            encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            return decode_jpeg(encoded, mode=ImageReadMode.RGB)
        except (RuntimeError, ImportError, DeprecationWarning):
            pass  # a broken image; or a torchvision without decoders, which it is about to drop
    import PIL.Image

    try:
        image = _eight_bits(PIL.Image.open(io.BytesIO(data))).convert("RGB")
    except (
        OSError,
        SyntaxError,
        ValueError,
        IndexError,
        OverflowError,
        EOFError,
        struct.error,
        zlib.error,
        PIL.Image.DecompressionBombError,
    ) as error:
        raise DataError(f"{name} is no readable image ({error})") from error
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _eight_bits(image: Image) -> Image:
    """Grey images of more bits brought to 8; Pillow would cut their values off at 255."""
    import PIL.Image

    # Older releases of Pillow read the 16 bits of a PNG into 32.
    if image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PNG"):
        return PIL.Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(
            f"pixels of mode {image.mode}, 32 bits, have no known range; convert them to 8 or 16"
        )
    return image
