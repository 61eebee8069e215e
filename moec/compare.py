"""Comparing graphs by structure: which ops are the same, which read something else, which are new.

Ops are matched by what they are (kind, attributes, types, body), in an order that both graphs
share, not by their printed lines: a value that only got another name makes no difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from enum import StrEnum

from moec.ir.graph import Graph, Op, Value
from moec.ir.text import show, show_attribute


class Change(StrEnum):
    """What became of an op."""

    SAME = "same"
    REWIRED = "rewired"  # the same op, on other operands
    REMOVED = "removed"
    ADDED = "added"


@dataclass(frozen=True)
class Difference:
    """One line of a comparison: the op before, the op after, or both."""

    change: Change
    before: Op | None
    after: Op | None


def compare(before: Graph, after: Graph) -> list[Difference]:
    """Every op of both graphs once, in an order that agrees with both."""
    matcher = SequenceMatcher(None, _keys(before), _keys(after), autojunk=False)
    mapping = _matched_inputs(before, after)
    lines: list[Difference] = []
    for tag, i, k, j, m in matcher.get_opcodes():
        if tag == "equal":
            lines += _matched(before.ops[i:k], after.ops[j:m], mapping)
        else:
            lines += [Difference(Change.REMOVED, op, None) for op in before.ops[i:k]]
            lines += [Difference(Change.ADDED, None, op) for op in after.ops[j:m]]
    return lines


def is_same(before: Graph, after: Graph) -> bool:
    """Whether two graphs differ in names and places at most."""
    lines = compare(before, after)
    mapping = _matched_inputs(before, after)
    for line in lines:
        if line.change is not Change.SAME or line.before is None or line.after is None:
            return False
        mapping.update(zip(line.before.results, line.after.results, strict=True))
    types = [[v.type for v in (*g.inputs, *g.cotangents)] for g in (before, after)]
    returned = [mapping.get(v) for v in before.returned]
    return types[0] == types[1] and returned == list(after.returned)


def _keys(graph: Graph) -> list[str]:
    return [_key(op) for op in graph.ops]


def _key(op: Op) -> str:
    types = ", ".join(str(v.type) for v in (*op.operands, *op.results))
    attrs = ", ".join(f"{k}={show_attribute(v)}" for k, v in sorted(op.attrs.items()))
    body = show(op.body, locations=False) if op.body is not None else ""
    return f"{op.kind} {attrs} {types} {body}"


def _matched_inputs(before: Graph, after: Graph) -> dict[Value, Value]:
    """Inputs by place, where the types agree."""
    pairs = zip(
        (*before.inputs, *before.cotangents), (*after.inputs, *after.cotangents), strict=False
    )
    return {a: b for a, b in pairs if a.type == b.type}


def _matched(
    before: Sequence[Op], after: Sequence[Op], mapping: dict[Value, Value]
) -> list[Difference]:
    lines = []
    for a, b in zip(before, after, strict=True):
        same = tuple(mapping.get(v) for v in a.operands) == b.operands
        lines.append(Difference(Change.SAME if same else Change.REWIRED, a, b))
        mapping.update(zip(a.results, b.results, strict=True))
    return lines


__all__ = ["Change", "Difference", "compare", "is_same"]
