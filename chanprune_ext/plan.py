"""A pruning plan: an immutable, serialisable record of every channel that stays."""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from chanprune_ext.analysis.couplings import Couplings
from chanprune_ext.analysis.groups import Frozen
from chanprune_ext.analysis.provenance import Attribute
from chanprune_ext.analysis.scales import Rescaling
from chanprune_ext.analysis.settings import contents_of, owner_of
from chanprune_ext.analysis.stand_ins import tensors_with
from chanprune_ext.atomic_files import write_text
from chanprune_ext.errors import CheckpointError, InvalidArgumentError, PlanMismatchError
from chanprune_ext.group_summary import GroupSummary
from chanprune_ext.module_tree import modules_of

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Container, Iterator, Mapping

    from torch.optim import Optimizer

    from chanprune_ext.explanation import Explanation

__all__ = ["PruningPlan", "plan_of", "plans_of", "plans_within", "structure_of"]

FORMAT = 1
_ATTRIBUTE = "_chanprune_plans"
_COLUMN = 40  # characters of a list of names in the table of a plan


@dataclass(frozen=True, eq=False)
class PruningPlan:
    """Which indices of which parameters stay, and everything needed to apply that again.

    Attributes:
        kept: Parameter or buffer name -> {dim: kept indices, int64, sorted, unique}; only what
            changes is listed.
        attributes: Ints stored on modules that must change -> new value.
        rescalings: Kept indices that are multiplied, so that a constant which the model computes
            from a width (the scale of attention logits) keeps its effect.
        caches: Module and attribute of each container that a forward fills with tensors: a pruned
            model starts with them empty.
        groups: Every prunable coupling group, with its width before and after.
        frozen: Output channels that no plan may remove, and why.
        params_before, params_after: Elements of all parameters.
        macs_before, macs_after: Multiply-accumulates of one forward on the example inputs.
        criterion: Name of the criterion.
        options: The selection arguments the plan was made with.
        fingerprint: Structure of the model the plan belongs to.
        inputs: Shapes and dtypes of the example inputs, nested as they were given.
        deferred_couplings: Makes :attr:`couplings`.
        example_inputs: The inputs themselves; not saved.
        outputs: What picks the outputs that keep their shape; not saved.
    """

    kept: Mapping[str, Mapping[int, Tensor]]
    attributes: Mapping[Attribute, int]
    rescalings: tuple[Rescaling, ...]
    caches: tuple[tuple[str, str], ...]
    groups: tuple[GroupSummary, ...]
    frozen: tuple[Frozen, ...]
    params_before: int
    params_after: int
    macs_before: int
    macs_after: int
    criterion: str
    options: Mapping[str, Any]
    fingerprint: Mapping[str, Any]
    inputs: Any
    deferred_couplings: Callable[[], Couplings] = field(default=Couplings, repr=False)
    example_inputs: Any = field(default=None, repr=False)
    outputs: Callable[[Any], Any] | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """A pickled model carries its plan, but no batch of inputs."""
        couplings = self.couplings
        return {
            **vars(self),
            "couplings": couplings,
            "deferred_couplings": Couplings,
            "example_inputs": None,
            "outputs": None,
        }

    @functools.cached_property
    def couplings(self) -> Couplings:
        """What couples the channels of each group, for :meth:`explain`.

        Put together when it is asked for, or the plan is saved: pruning itself does not need it.
        """
        couplings = self.deferred_couplings()
        # What it was made of, the whole trace, is not needed any more.
        object.__setattr__(self, "deferred_couplings", Couplings)
        return couplings

    @property
    def pruned(self) -> dict[str, dict[int, Tensor]]:
        """Parameter or buffer name -> {dim: removed indices, int64, sorted}."""
        removed: dict[str, dict[int, Tensor]] = {}
        for entry, dims in self.kept.items():
            shape = self.fingerprint["tensors"][entry]
            for dim, kept in dims.items():
                mask = torch.ones(shape[dim], dtype=torch.bool, device="cpu")
                mask[kept] = False
                removed.setdefault(entry, {})[dim] = mask.nonzero().flatten()
        return removed

    def apply(
        self,
        model: nn.Module,
        *,
        inplace: bool = False,
        optimizer: Optimizer | None = None,
        verify: str | None = "replay",
        example_inputs: Any = None,
    ) -> nn.Module:
        """Prune ``model``, all or nothing: see :func:`chanprune_ext.surgery.apply_plan`."""
        from chanprune_ext.surgery import apply_plan

        return apply_plan(
            self,
            model,
            inplace=inplace,
            optimizer=optimizer,
            verify=verify,
            example_inputs=example_inputs,
        )

    def explain(self, name: str) -> Explanation:
        """Say who is coupled to a layer, through which operation, and what keeps its channels.

        Args:
            name: A module, for all its parameters and those of its children, or one parameter or
                buffer; a shared one under any of its names.

        Returns:
            An object to print, with the same facts as attributes.

        Raises:
            InvalidArgumentError: Nothing of the model has this name, or it has no parameters.
        """
        from chanprune_ext.explanation import explain

        return explain(name, self.couplings, self.groups, self.frozen, self.fingerprint)

    def check(self, model: nn.Module) -> None:
        """Raise :class:`PlanMismatchError`, naming the first difference, unless the plan fits."""
        if not isinstance(model, nn.Module):
            raise InvalidArgumentError(
                f"model must be a torch.nn.Module, got {type(model).__name__}"
            )
        structure = structure_of(model, self.kept)
        for name, _ in model.named_buffers():
            # A buffer that does not shrink may have been filled by a forward since.
            if name not in self.kept and name in self.fingerprint["tensors"]:
                structure["tensors"][name] = self.fingerprint["tensors"][name]
        difference = _first_difference(self.fingerprint, structure)
        if difference is None:
            for attribute in self.attributes:
                owner, name = owner_of(model, attribute)
                value = contents_of(owner).get(name)
                if attribute.position is not None and isinstance(value, (tuple, list)):
                    value = value[attribute.position]
                if value != attribute.value:
                    difference = f"{attribute} is {value}, the plan expects {attribute.value}"
                    break
        if difference is not None:
            hint = " (this model has been pruned already)" if plan_of(model) is not None else ""
            raise PlanMismatchError(f"the plan was made for another model{hint}: {difference}")

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain numbers, strings, lists and dicts."""
        return {
            "format": FORMAT,
            "kept": {
                entry: {str(dim): index.tolist() for dim, index in dims.items()}
                for entry, dims in self.kept.items()
            },
            "attributes": [
                {**asdict(attribute), "new": new} for attribute, new in self.attributes.items()
            ],
            "rescalings": [{**vars(r), "indices": r.indices.tolist()} for r in self.rescalings],
            "caches": [list(c) for c in self.caches],
            "groups": [asdict(g) for g in self.groups],
            "frozen": [asdict(f) for f in self.frozen],
            "params": [self.params_before, self.params_after],
            "macs": [self.macs_before, self.macs_after],
            "criterion": self.criterion,
            "options": dict(self.options),
            "fingerprint": dict(self.fingerprint),
            "inputs": self.inputs,
            "couplings": self.couplings.to_dict(),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PruningPlan:
        """The inverse of :meth:`to_dict`.

        Raises:
            CheckpointError: A field is missing or of the wrong kind.
        """
        try:
            if data["format"] != FORMAT:
                raise CheckpointError(
                    f"the plan has format {data['format']}, this version reads format {FORMAT}"
                )
            attributes = {}
            for item in data["attributes"]:
                fields = {k: v for k, v in item.items() if k != "new"}
                attributes[Attribute(**fields)] = int(item["new"])
            kept = {
                entry: {
                    int(dim): torch.tensor(index, dtype=torch.int64, device="cpu")
                    for dim, index in dims.items()
                }
                for entry, dims in data["kept"].items()
            }
            _check_indices(kept, data["fingerprint"]["tensors"])
            rescalings = tuple(
                Rescaling(
                    **{**r, "indices": torch.tensor(r["indices"], dtype=torch.int64, device="cpu")}
                )
                for r in data["rescalings"]
            )
            return cls(
                kept=kept,
                attributes=attributes,
                rescalings=rescalings,
                caches=tuple((str(m), str(n)) for m, n in data["caches"]),
                groups=tuple(
                    GroupSummary(
                        **{
                            **g,
                            "producers": tuple(g["producers"]),
                            "consumers": tuple(g["consumers"]),
                        }
                    )
                    for g in data["groups"]
                ),
                frozen=tuple(Frozen(**f) for f in data["frozen"]),
                params_before=int(data["params"][0]),
                params_after=int(data["params"][1]),
                macs_before=int(data["macs"][0]),
                macs_after=int(data["macs"][1]),
                criterion=data["criterion"],
                options=data["options"],
                fingerprint=data["fingerprint"],
                inputs=data["inputs"],
                deferred_couplings=functools.partial(_given, _read_couplings(data)),
            )
        except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"not a pruning plan: {type(error).__name__}: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON, whole or not at all.

        Raises:
            OutputError: The file cannot be written.
        """
        text = json.dumps(self.to_dict())
        write_text(path, text)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PruningPlan:
        """Read a plan written by :meth:`save`.

        Raises:
            CheckpointError: The file is missing, truncated or not a plan.
        """
        try:
            data = json.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot read a plan from '{path}': {error}") from error
        return cls.from_dict(data)

    def __repr__(self) -> str:
        changed = sum(g.width_after < g.width_before for g in self.groups)
        return (
            f"<{type(self).__name__} of a {self.fingerprint['class']}: {changed} of "
            f"{len(self.groups)} groups lose channels, "
            f"params {self.params_before:,} -> {self.params_after:,}, "
            f"MACs {self.macs_before:,} -> {self.macs_after:,}>"
        )

    def __str__(self) -> str:
        rows = [
            (g.name, g.kind, f"{g.width_before}", f"{g.width_after}", _short(g.producers[1:]))
            for g in self.groups
        ]
        header = ("group", "kind", "width", "kept", "also made by")
        widths = [max(len(r[i]) for r in (header, *rows)) for i in range(5)]
        lines = [
            "  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip()
            for r in (header, *rows)
        ]
        lines.insert(1, "  ".join("-" * w for w in widths))
        lines.append("")
        lines.extend(
            f"{name}: {before:,} -> {after:,} (x{after / max(before, 1):.3f})"
            for name, before, after in (
                ("params", self.params_before, self.params_after),
                ("MACs", self.macs_before, self.macs_after),
            )
        )
        lines.extend(_reached(self.options.get("reached", {})))
        lines.extend(str(f) for f in self.frozen)
        return "\n".join(lines)


def _reached(reached: Mapping[str, Any]) -> Iterator[str]:
    """What was measured of a plan for a budget on latency or file size."""
    if found := reached.get("latency"):
        yield (
            f"latency: {found['original_ms']:.4g} -> {found['pruned_ms']:.4g} ms "
            f"(x{found['ratio']:.3f} ± {found['standard_error']:.3f}; {found['conditions']})"
        )
    if found := reached.get("file_size"):
        yield (
            f"file: {found['original_bytes']:,} -> {found['bytes']:,} bytes (x{found['ratio']:.3f})"
        )


def _given(couplings: Couplings) -> Couplings:
    return couplings


def _read_couplings(data: Mapping[str, Any]) -> Couplings:
    """The couplings of a saved plan; none where an older version saved it."""
    if "couplings" not in data:
        return Couplings()
    couplings = Couplings.from_dict(data["couplings"])
    if len(couplings.units) != len(data["groups"]):
        raise ValueError(f"couplings of {len(couplings.units)} groups, not {len(data['groups'])}")
    return couplings


def _check_indices(
    kept: Mapping[str, Mapping[int, Tensor]], shapes: Mapping[str, list[int]]
) -> None:
    """Indices must be sorted, unique, within their dimension, and leave something."""
    for entry, dims in kept.items():
        for dim, index in dims.items():
            size = shapes[entry][dim] if dim >= 0 else 0
            steps = torch.diff(index, prepend=index.new_tensor([-1]))
            if index.dim() != 1 or not len(index) or steps.min() < 1 or index[-1] >= size:
                raise CheckpointError(
                    f"the plan keeps indices of dimension {dim} of '{entry}' that are not sorted, "
                    f"unique and below {size}"
                )


def _short(names: tuple[str, ...]) -> str:
    """As many of the names as fit into a column, and how many more there are."""
    for shown in range(len(names), 0, -1):
        more = [f"{len(names) - shown} more"] if shown < len(names) else []
        text = ", ".join([*names[:shown], *more])
        if len(text) <= _COLUMN:
            return text
    return f"{len(names)} more" if names else ""


def plan_of(model: nn.Module) -> PruningPlan | None:
    """The plan a pruned model was made by, the last of several; None for any other model."""
    plans = plans_of(model)
    return plans[-1] if plans else None


def plans_of(model: nn.Module) -> tuple[PruningPlan, ...]:
    """All plans that led from the plain model to this one, in order."""
    plans = model.__dict__.get(_ATTRIBUTE, ())
    return plans if isinstance(plans, tuple) else ()


def plans_within(model: nn.Module) -> dict[str, tuple[PruningPlan, ...]]:
    """Path of a module -> the plans that it was pruned by on its own; outer modules first."""
    return {path: plans for path, module in modules_of(model) if (plans := plans_of(module))}


def attach_plans(model: nn.Module, plans: tuple[PruningPlan, ...]) -> None:
    """Remember on a pruned model the plans it was made by."""
    if plans:
        model.__dict__[_ATTRIBUTE] = plans
    else:
        model.__dict__.pop(_ATTRIBUTE, None)


def structure_of(model: nn.Module, kept: Container[str] = ()) -> dict[str, Any]:
    """What must agree between two models for a plan to mean the same in both.

    Args:
        model: One of them.
        kept: Entries that the plan shortens: what else a module holds as a plain attribute may have
            been left there by a forward.
    """
    return {
        "class": _class_name(model),
        "modules": {name: _class_name(m) for name, m in modules_of(model) if name},
        "tensors": {name: list(t.shape) for name, t in tensors_with(model, kept).items()},
    }


def _class_name(module: nn.Module) -> str:
    """The name of a module's class; torch.fx makes one for every module, and names it anew."""
    return "GraphModule" if isinstance(module, GraphModule) else type(module).__name__


def _first_difference(expected: Mapping[str, Any], found: Mapping[str, Any]) -> str | None:
    if expected["class"] != found["class"]:
        return f"its class is {found['class']}, the plan's is {expected['class']}"
    for kind, noun in (("tensors", "parameter"), ("modules", "module")):
        for name, value in expected[kind].items():
            if name not in found[kind]:
                return f"it has no {noun} '{name}'"
            if found[kind][name] != value:
                return f"{noun} '{name}' is {found[kind][name]}, the plan expects {value}"
        for name in found[kind]:
            if name not in expected[kind]:
                return f"it has a {noun} '{name}' that the plan does not know"
    return None
