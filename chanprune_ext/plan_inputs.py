"""Example inputs from what a plan remembers of them: shapes and dtypes."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["inputs_from"]


def inputs_from(spec: Any, device: torch.device | str = "cpu") -> Any:
    """Inputs of zeros, nested as those a plan was made with.

    Args:
        spec: :attr:`chanprune_ext.PruningPlan.inputs`.
        device: Where the tensors go.
    """
    if "shape" in spec:
        return torch.zeros(spec["shape"], dtype=getattr(torch, spec["dtype"]), device=device)
    if "dict" in spec:
        return {key: inputs_from(value, device) for key, value in spec["dict"].items()}
    if "tuple" in spec:
        return tuple(inputs_from(value, device) for value in spec["tuple"])
    if "list" in spec:
        return [inputs_from(value, device) for value in spec["list"]]
    return spec["value"]
