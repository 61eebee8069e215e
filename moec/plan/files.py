"""Graphs and schedules as JSON.

Graphs are read in two forms: "moec-remat-graph/1", and node-link data whose nodes have
``cost_ram`` and ``cost_cpu`` (or ``out_cost`` and ``duration``). A size or a duration may be a
polynomial in the number of tokens: ``{"T": [c0, c1, c2], "round": r}`` is c0 + c1 T + c2 T^2,
rounded up to a multiple of r. docs/planning.md describes both formats.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from moec.errors import PlanError
from moec.plan.problem import Node, Problem, make_problem

GRAPH_FORMAT = "moec-remat-graph/1"
SCHEDULE_FORMAT = "moec-remat-schedule/1"


def read_problem(text: str, where: str, tokens: int | None = None) -> Problem:
    """The problem that a text describes; ``where`` is named in errors, ``tokens`` is T.

    Raises:
        PlanError: the text is no graph; the message gives the line, or the path of the field.
    """
    data = _Field(where, _json(text, where))
    if "format" in data.mapping():
        return _native(data, tokens)
    return _node_link(data, tokens)


def _json(text: str, where: str) -> Any:
    def refuse(constant: str) -> NoReturn:
        raise PlanError(f"{where}: {constant} is no number in JSON; durations must be finite")

    try:
        return json.loads(text, parse_constant=refuse)
    except json.JSONDecodeError as error:
        raise PlanError(f"{where}:{error.lineno}:{error.colno}: {error.msg}") from error
    except (RecursionError, ValueError) as error:
        # Too deep a nesting, or a number of more digits than Python converts.
        raise PlanError(f"{where}: cannot be read as JSON: {error}") from error


class _Field:
    """A piece of the data and its path, so that every error says where."""

    def __init__(self, path: str, value: Any) -> None:
        self.path = path
        self.value = value

    def fail(self, expected: str) -> NoReturn:
        shown = json.dumps(self.value)
        raise PlanError(f"{self.path}: expected {expected}, got {shown[:60]}")

    def mapping(self) -> Mapping[str, Any]:
        if not isinstance(self.value, dict):
            self.fail("an object")
        return self.value

    def items(self) -> list[_Field]:
        if not isinstance(self.value, list):
            self.fail("a list")
        return [_Field(f"{self.path}[{i}]", item) for i, item in enumerate(self.value)]

    def items_or_one(self) -> list[_Field]:
        """The items of a list; what is no list, alone."""
        return self.items() if isinstance(self.value, list) else [self]

    def get(self, *names: str, default: Any = ...) -> _Field:
        """The first of these keys that is present."""
        mapping = self.mapping()
        for name in names:
            if name in mapping:
                return _Field(
                    f"{self.path}: {name}" if "[" not in self.path else f"{self.path}.{name}",
                    mapping[name],
                )
        if default is ...:
            self.fail(f"an object with the key {names[0]!r}")
        return _Field(f"{self.path}: {names[0]}", default)

    def integer(self) -> int:
        if isinstance(self.value, float) and self.value.is_integer():
            return int(self.value)
        if not isinstance(self.value, int) or isinstance(self.value, bool):
            self.fail("an integer")
        return self.value

    def number(self) -> float:
        if not isinstance(self.value, int | float) or isinstance(self.value, bool):
            self.fail("a number")
        try:
            value = float(self.value)
        except OverflowError:
            self.fail("a number that a float can hold")
        if not math.isfinite(value):
            self.fail("a finite number")
        return value

    def flag(self) -> bool:
        if not isinstance(self.value, bool):
            self.fail("true or false")
        return self.value

    def quantity(self, tokens: int | None) -> float | int:
        """A number, or a polynomial in the number of tokens."""
        if not isinstance(self.value, dict):
            return self.value if isinstance(self.value, int) else self.number()
        if tokens is None:
            raise PlanError(f"{self.path}: depends on the number of tokens T; say which (--tokens)")
        coefficients = [c.number() for c in self.get("T").items()]
        exact = [int(c) if float(c).is_integer() else c for c in coefficients]
        value: float = sum(c * tokens**power for power, c in enumerate(exact))
        step = self.get("round", default=0).integer()
        return -(-value // step) * step if step else value

    def bytes(self, tokens: int | None) -> int:
        """A size: not negative, whole."""
        value = self.quantity(tokens)
        if isinstance(value, bool) or value < 0 or value != int(value):
            self.fail("a size in bytes: a whole number that is not negative")
        return int(value)

    def duration(self, tokens: int | None) -> float:
        """A duration: finite, not negative."""
        value = _Field(self.path, self.quantity(tokens)).number()
        if value < 0:
            self.fail("a duration that is not negative")
        return value


def _native(data: _Field, tokens: int | None) -> Problem:
    if data.get("format").value != GRAPH_FORMAT:
        data.get("format").fail(f'the format "{GRAPH_FORMAT}"')
    nodes = [
        _native_node(field, place, tokens) for place, field in enumerate(data.get("nodes").items())
    ]
    edges = [_edge(field) for field in data.get("edges").items()]
    order = [v.integer() for v in data.get("order").items()] if "order" in data.value else None
    resident = data.get("const", default=0).bytes(tokens)
    return make_problem(str(data.get("name").value), nodes, edges, order, resident)


def _native_node(field: _Field, place: int, tokens: int | None) -> Node:
    if field.get("id").integer() != place:
        field.get("id").fail(f"the node's place in the list, {place}")
    sizes = field.get("size").items_or_one()
    outputs = [size.bytes(tokens) for size in sizes]
    return Node(
        str(field.get("name", default=place).value),
        outputs,
        field.get("time").duration(tokens),
        field.get("workspace", default=0).bytes(tokens),
        _keep(field.get("keep", default=False), len(outputs)),
        field.get("rematable", default=True).flag(),
    )


def _keep(field: _Field, outputs: int) -> list[bool]:
    if not isinstance(field.value, list):
        return [field.flag()] * outputs
    kept = [output.integer() for output in field.items()]
    if not all(0 <= output < outputs for output in kept):
        field.fail(f"numbers of outputs, of which there are {outputs}")
    return [output in kept for output in range(outputs)]


def _edge(field: _Field) -> tuple[tuple[int, int], int]:
    ends = field.items()
    if len(ends) != 2:
        field.fail("an edge: [source, user] or [[source, output], user]")
    source = ends[0].items_or_one()
    if len(source) > 2 or (len(source) != 2 and source != ends[:1]):
        ends[0].fail("a node, or [node, output]")
    output = source[1].integer() if len(source) == 2 else 0
    return (source[0].integer(), output), ends[1].integer()


def _node_link(data: _Field, tokens: int | None) -> Problem:
    about = data.get("graph", default={})
    nodes, places = [], {}
    for place, field in enumerate(data.get("nodes").items()):
        name = field.get("id", "name")
        if not isinstance(name.value, str | int):
            name.fail("a name")
        places[name.value] = place
        size = field.get("cost_ram", "out_cost").bytes(tokens)
        nodes.append(
            Node(str(name.value), size, field.get("cost_cpu", "duration").duration(tokens))
        )

    def place_of(field: _Field) -> int:
        if not isinstance(field.value, str | int) or field.value not in places:
            field.fail("the name of a node")
        return places[field.value]

    edges = [
        (place_of(e.get("source", "0")), place_of(e.get("target", "1")))
        for e in data.get("links", "edges").items()
    ]
    order = [place_of(v) for v in about.get("order").items()] if "order" in about.value else None
    return make_problem(str(about.get("name", default="graph").value), nodes, edges, order)


def schedule_json(graph: str, sequence: Sequence[int], facts: Mapping[str, Any]) -> str:
    """A schedule as text: the nodes in order of execution, freed right after their last use.

    ``facts`` (peak, time, bound, ...) are there for readers; nothing depends on them.
    """
    data = {"format": SCHEDULE_FORMAT, "graph": graph, "facts": dict(facts)}
    return json.dumps({**data, "seq": list(sequence)}) + "\n"
