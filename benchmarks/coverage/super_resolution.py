"""Networks that restore and enlarge images, as spandrel has them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.coverage.case import images
from benchmarks.coverage.library_case import library_case

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.coverage.case import Case

__all__ = ["cases"]

_WINDOWS = {"embed_dim": 36, "depths": (2, 2), "num_heads": (2, 2)}
# Module and class, the side of an image that it takes, and what it is made with.
_NETWORKS: tuple[tuple[str, str, int, dict[str, Any]], ...] = (
    (
        "ATD.__arch.atd_arch",
        "ATD",
        32,
        {
            **_WINDOWS,
            "window_size": 8,
            "category_size": 16,
            "num_tokens": 8,
            "reducted_dim": 4,
        },
    ),
    ("Compact.__arch.SRVGG", "SRVGGNetCompact", 32, {}),
    ("CRAFT.__arch.CRAFT", "CRAFT", 32, {}),
    (
        "DAT.__arch.DAT",
        "DAT",
        32,
        {"embed_dim": 36, "depth": [2], "num_heads": [2], "split_size": [2, 4]},
    ),
    ("DCTLSA.__arch.dctlsa", "DCTLSA", 32, {}),
    ("DITN.__arch.DITN_Real", "DITN_Real", 32, {}),
    ("ESRGAN.__arch.RRDB", "RRDBNet", 32, {"num_blocks": 2}),
    ("FBCNN.__arch.FBCNN", "FBCNN", 32, {}),
    ("FDAT.__arch.fdat", "FDAT", 32, {}),
    ("KBNet.__arch.kbnet_s", "KBNet_s", 64, {}),
    ("MoESR.__arch.MoESR", "MoESR", 32, {}),
    ("MoSR.__arch.mosr_arch", "MoSR", 32, {}),
    ("NAFNet.__arch.NAFNet_arch", "NAFNet", 32, {}),
    ("OmniSR.__arch.OmniSR", "OmniSR", 32, {}),
    ("PLKSR.__arch.PLKSR", "PLKSR", 32, {}),
    ("PLKSR.__arch.RealPLKSR", "RealPLKSR", 32, {}),
    ("RCAN.__arch.rcan_arch", "RCAN", 32, {"n_resgroups": 2, "n_resblocks": 2}),
    ("RestoreFormer.__arch.restoreformer_arch", "RestoreFormer", 32, {}),
    ("RetinexFormer.__arch.retinexformer_arch", "RetinexFormer", 64, {}),
    ("RGT.__arch.rgt", "RGT", 32, {"embed_dim": 36, "depth": [1], "num_heads": [2]}),
    ("RealCUGAN.__arch.upcunet_v3", "UpCunet2x", 64, {}),
    ("SCUNet.__arch.SCUNet", "SCUNet", 64, {}),
    ("SwiftSRGAN.__arch.SwiftSRGAN", "Generator", 32, {}),
)


def cases() -> Iterator[Case]:
    """Published sizes where they are small, else a few blocks."""
    for module, kind, side, options in _NETWORKS:
        package = f"spandrel.architectures.{module}"
        yield library_case(package, kind, images(2, 3, side, side), **options)
