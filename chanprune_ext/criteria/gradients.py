"""Criteria on the loss: what its Taylor expansion says a unit is worth.

A unit goes when the weights that read it become zero; by those weights ``w`` the change of the loss
is expanded. To first order that is the same as a gate on the channel's activations, whatever lies
between the filter and its readers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chanprune_ext.analysis.calls import run_model
from chanprune_ext.analysis.stand_ins import substitute, tensors_of
from chanprune_ext.errors import InvalidArgumentError
from chanprune_ext.module_modes import evaluating

from .members import Scores, chosen_members

if TYPE_CHECKING:
    from chanprune_ext.analysis import CouplingGroup
    from chanprune_ext.analysis.groups import Member

__all__ = ["hessian", "taylor"]

LossFunction = Callable[[Any, Any], Tensor]


def taylor(
    batches: Iterable[Any], loss_fn: LossFunction | None = None
) -> Callable[[nn.Module, Sequence[CouplingGroup], int], Scores]:
    """A criterion: squared first-order change of the loss (Molchanov et al. 2019, CVPR).

    ``score_u = mean over batches of (sum over w in u of w dL/dw)^2``, the sum over all readers of
    the unit.

    Args:
        batches: Pairs (inputs, labels), inputs as for :func:`chanprune_ext.plan`; read once for
            every use of the criterion.
        loss_fn: ``loss_fn(output, labels) -> scalar``. Default: cross-entropy of logits.

    Returns:
        A function for the ``criterion`` argument of :func:`chanprune_ext.plan`. The model runs in
        evaluation mode and keeps its gradients.
    """

    def criterion(model: nn.Module, groups: Sequence[CouplingGroup], seed: int) -> Scores:
        def squared(units: _Units, loss: Tensor) -> list[np.ndarray]:
            return [s**2 for s in units.first_order(units.gradients(loss))]

        return _averaged(model, groups, batches, loss_fn, squared)

    criterion.__name__ = "taylor"
    return criterion


def hessian(
    batches: Iterable[Any], loss_fn: LossFunction | None = None, *, probes: int = 4
) -> Callable[[nn.Module, Sequence[CouplingGroup], int], Scores]:
    """A criterion: the change of the loss to second order, for each unit alone.

    ``score_u = mean over batches of -sum w dL/dw + w_u^T H_uu w_u / 2`` with the exact Hessian of
    the unit's own weights, where Optimal Brain Damage (LeCun et al. 1990) has its diagonal. The
    quadratic forms of all units at once come out of Hessian-vector products with random signs for
    the units, which cancel between units on average (Hutchinson's estimator in blocks).

    Args:
        batches: As for :func:`taylor`.
        loss_fn: As for :func:`taylor`; it must be twice differentiable.
        probes: Products for each batch, each about two more backward passes. Default: 4.

    Returns:
        A function for the ``criterion`` argument of :func:`chanprune_ext.plan`.

    Raises:
        InvalidArgumentError: ``probes`` is not positive.
    """
    if probes < 1:
        raise InvalidArgumentError(f"probes must be at least 1, got {probes}")

    def criterion(model: nn.Module, groups: Sequence[CouplingGroup], seed: int) -> Scores:
        generator = torch.Generator().manual_seed(seed)

        def expanded(units: _Units, loss: Tensor) -> list[np.ndarray]:
            gradients = units.gradients(loss, create_graph=True)
            change = [-s for s in units.first_order([g.detach() for g in gradients])]
            for _ in range(probes):
                for total, form in zip(
                    change, units.quadratic_forms(gradients, generator), strict=True
                ):
                    total += form / (2 * probes)
            return change

        return _averaged(model, groups, batches, loss_fn, expanded)

    criterion.__name__ = "hessian"
    return criterion


class _Units:
    """The weights that read the units of all groups."""

    def __init__(self, model: nn.Module, groups: Sequence[CouplingGroup]) -> None:
        tensors = tensors_of(model)
        self.groups = groups
        self.members = [chosen_members(g, tensors, "readers") for g in groups]
        names = dict.fromkeys(m.entry for members in self.members for m in members)
        self.weights = {name: tensors[name] for name in names}
        for name, weight in self.weights.items():
            if not isinstance(weight, nn.Parameter):
                raise InvalidArgumentError(f"'{name}' is no parameter: it has no gradient")
            if weight.is_inference():
                raise InvalidArgumentError(
                    f"model: '{name}' was made inside torch.inference_mode, so it can have no "
                    "gradient; make or load the model outside of it"
                )

    def gradients(self, loss: Tensor, *, create_graph: bool = False) -> list[Tensor]:
        found = torch.autograd.grad(
            loss, list(self.weights.values()), create_graph=create_graph, allow_unused=True
        )
        return [
            torch.zeros_like(w) if g is None else g
            for w, g in zip(self.weights.values(), found, strict=True)
        ]

    def first_order(self, gradients: Sequence[Tensor]) -> list[np.ndarray]:
        """Sum of weight times gradient of every unit."""
        return self._sums(
            [
                _products(w.detach(), g)
                for w, g in zip(self.weights.values(), gradients, strict=True)
            ]
        )

    def quadratic_forms(
        self, gradients: Sequence[Tensor], generator: torch.Generator
    ) -> list[np.ndarray]:
        """An unbiased estimate of ``w_u^T H_uu w_u`` of every unit, from one product."""
        signs = [
            torch.randint(0, 2, (g.units,), generator=generator) * 2.0 - 1 for g in self.groups
        ]
        direction = {
            name: torch.zeros_like(w, requires_grad=False) for name, w in self.weights.items()
        }
        for sign, members in zip(signs, self.members, strict=True):
            for member in members:
                direction[member.entry] += self._signed(member, sign)
        along = torch.stack(
            [_products(g, d).sum() for g, d in zip(gradients, direction.values(), strict=True)]
        ).sum()
        product: Sequence[Tensor | None] = [None] * len(self.weights)
        if along.requires_grad:
            product = torch.autograd.grad(
                along, list(self.weights.values()), retain_graph=True, allow_unused=True
            )
        found = {
            name: torch.zeros_like(direction[name]) if p is None else p.detach()
            for name, p in zip(self.weights, product, strict=True)
        }
        forms = []
        for sign, members in zip(signs, self.members, strict=True):
            total = np.zeros(len(sign))
            for member in members:
                products = _products(self._signed(member, sign), found[member.entry])
                total += _unit_sums(products, member)
            forms.append(total)
        return forms

    def _signed(self, member: Member, signs: Tensor) -> Tensor:
        """The member's weights times their unit's sign, zero where no unit of the group is."""
        weight = self.weights[member.entry].detach()
        factor = torch.zeros(weight.shape[member.dim], dtype=weight.dtype, device="cpu")
        index = torch.from_numpy(np.ascontiguousarray(member.indices))
        factor[index] = signs[:, None].to(weight.dtype).expand(index.shape)
        shape = [1] * weight.dim()
        shape[member.dim] = -1
        return weight * factor.to(weight.device).view(shape)

    def _sums(self, values: Sequence[Tensor]) -> list[np.ndarray]:
        by_entry = dict(zip(self.weights, values, strict=True))
        sums = []
        for group, members in zip(self.groups, self.members, strict=True):
            total = np.zeros(group.units)
            for member in members:
                total += _unit_sums(by_entry[member.entry], member)
            sums.append(total)
        return sums


def _products(a: Tensor, b: Tensor) -> Tensor:
    """The terms of an inner product, in which complex numbers are pairs of real ones."""
    return (a.conj() * b).real


def _unit_sums(values: Tensor, member: Member) -> np.ndarray:
    others = [d for d in range(values.dim()) if d != member.dim]
    sums = values.double().sum(others).cpu().numpy()
    return np.asarray(sums[member.indices].sum(axis=1))


def _averaged(
    model: nn.Module,
    groups: Sequence[CouplingGroup],
    batches: Iterable[Any],
    loss_fn: LossFunction | None,
    measure: Callable[[_Units, Tensor], list[np.ndarray]],
) -> Scores:
    """The mean over batches of what ``measure`` says of each unit."""
    units = _Units(model, groups)
    device = next(iter(units.weights.values())).device if units.weights else torch.device("cpu")
    totals = [np.zeros(g.units) for g in groups]
    frozen = [p for p in units.weights.values() if not p.requires_grad]
    count = 0
    with torch.inference_mode(False), evaluating(model), torch.enable_grad():
        try:
            for parameter in frozen:
                parameter.requires_grad_(True)
            for batch in batches:
                inputs, labels = _pair(batch)
                inputs, labels = substitute((inputs, labels), lambda t: _usable(t.to(device)))
                output = run_model(model, inputs)
                loss = (
                    _cross_entropy(output, labels) if loss_fn is None else loss_fn(output, labels)
                )
                if not isinstance(loss, Tensor) or loss.dim():
                    raise InvalidArgumentError(
                        f"loss_fn must return a scalar tensor, got {_told(loss)}"
                    )
                if units.weights and not loss.requires_grad:
                    raise InvalidArgumentError(
                        "loss_fn: the loss it returned has no gradient; something in it, or in the "
                        "model's forward, is detached or runs under torch.no_grad"
                    )
                for total, score in zip(totals, measure(units, loss), strict=True):
                    total += score
                count += 1
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)
    if count == 0:
        raise InvalidArgumentError(
            "batches: expected at least one batch, got none; an iterator is empty after one use"
        )
    return [total / count for total in totals]


def _usable(tensor: Tensor) -> Tensor:
    """The tensor, copied if it was made in inference mode: autograd keeps none of those."""
    return tensor.clone() if tensor.is_inference() else tensor


def _pair(batch: Any) -> tuple[Any, Any]:
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    raise InvalidArgumentError(
        f"batches: expected pairs (inputs, labels), got {_told(batch)}; without labels give a "
        "loss_fn that ignores them and pairs (inputs, None)"
    )


def _cross_entropy(output: Any, labels: Any) -> Tensor:
    output = getattr(output, "logits", output)
    if not isinstance(output, Tensor) or not isinstance(labels, Tensor):
        raise InvalidArgumentError(
            f"loss_fn: needed for outputs and labels that are {_told(output)} and {_told(labels)}"
        )
    return F.cross_entropy(output, labels)


def _told(value: Any) -> str:
    return (
        f"a tensor of shape {list(value.shape)}"
        if isinstance(value, Tensor)
        else (f"a {type(value).__name__}")
    )
