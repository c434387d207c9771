"""The table of rules: how ATen operations treat axes of units."""

from __future__ import annotations

from typing import Any

import torch

from .rules_compute import COMPUTE_RULES, pointwise
from .rules_indexed import INDEX_RULES
from .rules_views import VIEW_RULES
from .tracer import Rule

RULES: dict[str, Rule] = {
    name: rule
    for table in (VIEW_RULES, COMPUTE_RULES, INDEX_RULES)
    for rule, names in table.items()
    for name in names.split()
}
"""Rules by the name of the ATen operation, or of that of another library with its namespace."""


def find_rule(func: Any) -> Rule | None:
    """Return the rule for an operator, or None; torch's tag `pointwise` is enough of a rule by itself."""
    namespace, name = func._schema.name.split("::")
    if namespace != "aten":
        return RULES.get(func._schema.name)
    if any(argument.is_out for argument in func._schema.arguments):
        return None
    if name in RULES:
        return RULES[name]
    if torch.Tag.pointwise in func.tags:
        return pointwise
    if name.endswith("_") and not name.startswith("_"):  # in-place forms do not carry the tag
        base = getattr(torch.ops.aten, name[:-1], None)
        if base is not None and any(torch.Tag.pointwise in getattr(base, o).tags for o in base.overloads()):
            return pointwise
    return None
