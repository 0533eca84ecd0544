"""Encoded images to pixels."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError

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
        DataError: the bytes are no complete image.
    """
    if data[:2] == _JPEG:
        try:
            from torchvision.io import ImageReadMode, decode_jpeg

            encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            return decode_jpeg(encoded, mode=ImageReadMode.RGB)
        except (RuntimeError, ImportError, DeprecationWarning):
            pass  # a broken image; or a torchvision without decoders, which it is about to drop
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(data)).convert("RGB")
    except (
        OSError,
        SyntaxError,
        ValueError,
        IndexError,
        OverflowError,
        EOFError,
        struct.error,
        zlib.error,
        Image.DecompressionBombError,
    ) as error:
        raise DataError(f"{name} is no readable image ({error})") from error
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
