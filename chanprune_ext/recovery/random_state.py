"""All random generators that a run draws from, as tensors, at one moment."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["generators_of", "random_state", "set_random_state"]

_NAN = float("nan")


def generators_of(loader: Any) -> list[torch.Generator]:
    """The generators that a data loader and its samplers own, each once."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    owners = (loader, getattr(loader, "sampler", None), getattr(batch_sampler, "sampler", None))
    owned = [getattr(owner, "generator", None) for owner in owners]
    return list(dict.fromkeys(g for g in owned if isinstance(g, torch.Generator)))


def random_state(device: torch.device, generators: Sequence[torch.Generator]) -> dict[str, Tensor]:
    """The states of torch's, numpy's and Python's global generators, and of some others.

    Args:
        device (torch.device): whose generator belongs to the run besides the CPU's.
        generators (Sequence[torch.Generator]): the others, such as :func:`generators_of` finds.
    """
    _, words, gauss = random.getstate()
    # Data sets of users draw from numpy's global generator, which is the legacy one.
    numpys = np.random.get_state(legacy=False)  # noqa: NPY002
    numbers = [*numpys["state"]["key"].tolist(), numpys["state"]["pos"], numpys["has_gauss"]]
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words, device="cpu"),
        "python.gauss": torch.tensor(
            [_NAN if gauss is None else gauss], dtype=torch.float64, device="cpu"
        ),
        "numpy": torch.tensor(numbers, device="cpu"),
        "numpy.gauss": torch.tensor([numpys["gauss"]], dtype=torch.float64, device="cpu"),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    for number, generator in enumerate(generators):
        state[f"loader{number}"] = generator.get_state()
    return state


def set_random_state(
    state: Mapping[str, Tensor], device: torch.device, generators: Sequence[torch.Generator]
) -> None:
    """The inverse of :func:`random_state`; what is not in ``state`` is left alone."""
    torch.set_rng_state(state["torch"])
    gauss = state["python.gauss"].item()
    random.setstate((3, tuple(state["python"].tolist()), None if gauss != gauss else gauss))
    *keys, position, has_gauss = state["numpy"].tolist()
    cached = state["numpy.gauss"].item()
    np.random.set_state(  # noqa: NPY002
        ("MT19937", np.array(keys, np.uint32), position, has_gauss, cached)
    )
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    for number, generator in enumerate(generators):
        if f"loader{number}" in state:
            generator.set_state(state[f"loader{number}"])
