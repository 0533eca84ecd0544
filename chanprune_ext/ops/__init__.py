"""The native tensor operators, their pure-torch references and what was built.

Each operator is one file: public function, reference, fake kernel, autograd. Importing this package
registers all of them before any can be called.
"""

from __future__ import annotations

from chanprune_ext.ops.build_info import build_info
from chanprune_ext.ops.channel_norms import channel_norms, channel_norms_reference
from chanprune_ext.ops.kd_kl_div import (
    kd_kl_div,
    kd_kl_div_reference,
    kd_kl_div_with_gradient,
)
from chanprune_ext.ops.slice_channels import slice_channels, slice_channels_reference

__all__ = [
    "build_info",
    "channel_norms",
    "channel_norms_reference",
    "kd_kl_div",
    "kd_kl_div_reference",
    "kd_kl_div_with_gradient",
    "slice_channels",
    "slice_channels_reference",
]
