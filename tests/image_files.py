"""Small image sets written for a test: folders, archives and shards of random JPEGs."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Mapping

DATA = Path(os.environ.get("CHANPRUNE_DATA", Path(__file__).parents[2] / "shared/data"))


def jpeg(seed: int, width: int = 90, height: int = 80) -> bytes:
    """A picture with some structure, so that a cut, a shift or a decoder's error shows."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((width, height)).save(buffer, "jpeg", quality=90)
    return buffer.getvalue()


def write_folder(root: Path, files: Mapping[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def write_tar(path: Path, files: Mapping[str, bytes]) -> Path:
    """A tar archive, compressed as the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mode = {".gz": "w:gz", ".tgz": "w:gz", ".bz2": "w:bz2", ".xz": "w:xz"}.get(path.suffix, "w")
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def write_shards(root: Path, files: Mapping[str, bytes], sizes: tuple[int, ...]) -> Path:
    """The files in their order as ``part-0000.tar`` and so on, of so many members each."""
    items = list(files.items())
    for number, size in enumerate(sizes):
        begin = sum(sizes[:number])
        write_tar(root / f"part-{number:04}.tar", dict(items[begin : begin + size]))
    return root
