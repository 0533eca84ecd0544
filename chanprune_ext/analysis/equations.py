"""Solve size equations under a removal: new attribute values, and what cannot be satisfied."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chanprune_ext.analysis.provenance import Attribute, Const, Dim, Equation, Expr, Op, leaves

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from chanprune_ext.analysis.groups import Analysis, Sizes

__all__ = ["AttributeKey", "attribute_key", "attributes_in", "solve_attributes"]

AttributeKey = tuple[str, str, int | None]


def attribute_key(attribute: Attribute) -> AttributeKey:
    """What tells one attribute of a model from another, whatever its value."""
    return attribute.module, attribute.name, attribute.position


def attributes_in(expr: Expr) -> list[Attribute]:
    """The attributes an expression reads."""
    return [leaf for leaf in leaves(expr) if isinstance(leaf, Attribute)]


def evaluate(expr: Expr, sizes: Sizes, values: Mapping[AttributeKey, int]) -> int:
    """The value of an expression with surviving sizes and the attribute values known so far."""
    if isinstance(expr, Const):
        return expr.value
    if isinstance(expr, Dim):
        return sizes.of(expr.slots)
    if isinstance(expr, Attribute):
        return values.get(attribute_key(expr), expr.value)
    left, right = evaluate(expr.left, sizes, values), evaluate(expr.right, sizes, values)
    if expr.symbol == "+":
        return left + right
    if expr.symbol == "-":
        return left - right
    if expr.symbol == "*":
        return left * right
    if right == 0:
        return -1
    return left // right if expr.symbol == "//" else left % right


def _invert(
    expr: Expr, target: int, unknown: AttributeKey, sizes: Sizes, values: Mapping[AttributeKey, int]
) -> int | None:
    """The value of the one unknown attribute for which ``expr`` equals ``target``."""
    if isinstance(expr, Attribute):
        return target
    if not isinstance(expr, Op):
        return None
    in_left = any(attribute_key(a) == unknown for a in attributes_in(expr.left))
    known = evaluate(expr.right if in_left else expr.left, sizes, values)
    inner = expr.left if in_left else expr.right
    if expr.symbol == "+":
        wanted: int | None = target - known
    elif expr.symbol == "-":
        wanted = target + known if in_left else known - target
    elif expr.symbol == "*":
        wanted = target // known if known and target % known == 0 else None
    elif expr.symbol == "//":
        if in_left:
            wanted = target * known
        else:
            wanted = known // target if target and known % target == 0 else None
    else:
        wanted = None
    return None if wanted is None else _invert(inner, wanted, unknown, sizes, values)


def _next_value(
    equations: Sequence[Equation], sizes: Sizes, values: Mapping[AttributeKey, int]
) -> tuple[Attribute, int] | None:
    """An attribute that an equation asks to change, and its value.

    An equation with one unknown attribute says what that is. Where all that are left have several,
    the largest of them follows the width: the smaller ones are numbers of parts.
    """
    several: list[tuple[Attribute, int]] = []
    for equation in equations:
        unknown = {
            attribute_key(a): a
            for a in attributes_in(equation.expr)
            if attribute_key(a) not in values
        }
        target = sizes.of(equation.slots)
        if not unknown or evaluate(equation.expr, sizes, values) == target:
            continue
        key, attribute = max(unknown.items(), key=lambda item: item[1].value)
        value = _invert(equation.expr, target, key, sizes, values)
        if value is not None and value >= 0:
            if len(unknown) == 1:
                return attribute, value
            several.append((attribute, value))
    return several[0] if several else None


def solve_attributes(
    analysis: Analysis, sizes: Sizes
) -> tuple[dict[Attribute, int], list[Equation]]:
    """Find the attribute values that a removal asks for.

    Returns:
        Attribute -> new value for those that change, and the equations that nothing satisfies:
        the two sides differ, a piece cut out of some channels would be left with none, or two sizes
        that the forward told apart would be equal.
    """
    values: dict[AttributeKey, int] = {}
    attributes: dict[AttributeKey, Attribute] = {}
    # Where an attribute is also the size of something that cannot change, that binds it first.
    pending = sorted(analysis.trace.equations, key=lambda equation: len(equation.slots) > 0)
    for equation in pending:
        if isinstance(equation.expr, Attribute):
            values.setdefault(attribute_key(equation.expr), sizes.of(equation.slots))
            attributes[attribute_key(equation.expr)] = equation.expr
    while found := _next_value(pending, sizes, values):
        attribute, value = found
        values[attribute_key(attribute)], attributes[attribute_key(attribute)] = value, attribute
    violated = [
        equation
        for equation in pending
        # A size of zero never makes a working layer, whatever the equation says.
        if evaluate(equation.expr, sizes, values) != sizes.of(equation.slots)
        or sizes.of(equation.slots) == 0 < equation.slots.shape[1]
    ]
    violated += [
        difference
        for difference in analysis.trace.differences
        if evaluate(difference.expr, sizes, values) == 0
    ]
    changed = {
        attributes[key]: value for key, value in values.items() if value != attributes[key].value
    }
    return changed, violated
