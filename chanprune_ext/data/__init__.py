"""Image classification data: in memory, in folders and archives, or in tar shards."""

from __future__ import annotations

from .files import FileImages
from .loader import calibration_batches, make_loader
from .opening import open_dataset
from .sets import ImageDataset, TensorImages
from .shards import ShardedImages
from .transforms import Augmentation, Preset

__all__ = [
    "Augmentation",
    "FileImages",
    "ImageDataset",
    "Preset",
    "ShardedImages",
    "TensorImages",
    "calibration_batches",
    "make_loader",
    "open_dataset",
]
