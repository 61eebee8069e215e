"""Passes and the manager that runs them; observers are the only hook around a pass."""

from __future__ import annotations

import inspect
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from moec import fuel
from moec.errors import MoecError, PassError
from moec.ir.graph import Graph
from moec.printable import printable

PassFunction = Callable[..., Graph]


@dataclass(frozen=True)
class PassDef:
    """A registered pass: name, function, and the dialects that it may leave behind; whether it is
    there to change what the graph computes.
    """

    name: str
    run: PassFunction
    leaves: frozenset[str]
    changes_meaning: bool = False

    @property
    def is_own(self) -> bool:
        """Whether moec brings this pass; others are registered by whoever uses moec."""
        return self.run.__module__.startswith("moec.passes.")

    @property
    def doc(self) -> str:
        """The docstring: first line for ``moec passes``, the whole for the docs."""
        return inspect.cleandoc(self.run.__doc__ or "")

    @property
    def options(self) -> dict[str, Any]:
        """Option names and defaults: the keyword-only parameters."""
        parameters = inspect.signature(self.run).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def _show(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


@dataclass(frozen=True)
class PassCall:
    """One step of a pipeline: a pass and its options."""

    definition: PassDef
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        inner = ",".join(f"{k.replace('_', '-')}={_show(v)}" for k, v in self.options.items())
        return self.definition.name + (f"{{{inner}}}" if inner else "")


@dataclass(frozen=True)
class Step:
    """What one pass did to one graph."""

    call: PassCall
    before: Graph
    after: Graph
    seconds: float
    rewrites: int

    @property
    def changed(self) -> bool:
        """Whether the pass changed the graph."""
        return self.after is not self.before


class Observer(Protocol):
    """Watches passes; may raise."""

    def before(self, call: PassCall, graph: Graph, index: int) -> None: ...

    def after(self, step: Step, index: int) -> None: ...


_PASSES: dict[str, PassDef] = {}


def register(
    name: str, leaves: Sequence[str] = ("t", "moe", "kern"), changes_meaning: bool = False
) -> Callable[[PassFunction], PassFunction]:
    """Decorator that registers a pass ``(graph, *, option=default) -> graph`` under a kebab-case
    name.
    """

    def add(function: PassFunction) -> PassFunction:
        _PASSES[name] = PassDef(name, function, frozenset(leaves), changes_meaning)
        return function

    return add


def all_passes() -> dict[str, PassDef]:
    """Every registered pass by name."""
    import moec.passes  # noqa: F401  (importing registers them)

    return dict(sorted(_PASSES.items()))


def find_pass(name: str) -> PassDef:
    """A pass by name, or a :class:`PassError` that lists all."""
    passes = all_passes()
    if name not in passes:
        raise PassError(f"unknown pass {name[:80]!r}; passes: {', '.join(passes)}")
    return passes[name]


# what is taken is never given back: a long gap would be tried at every length
_STEP = re.compile(
    r"(?P<name>[a-z][a-z0-9-]*+)\s*+(?:\{(?P<options>[^{}]*+)\})?\s*+(?:,\s*+|\Z)", re.ASCII
)
_COMMENT = re.compile(r"#[^\n]*")
_MAX_PIPELINE, _MAX_VALUE = 1 << 16, 1000


@dataclass(frozen=True)
class Place:
    """Where a pipeline's text stands: the name of the file, and line and column from 1."""

    name: str = "passes"
    line: int = 1
    column: int = 1

    def of(self, text: str, offset: int) -> str:
        """``name:line:column`` of a character of the text."""
        line, start = text.count("\n", 0, offset), text.rfind("\n", 0, offset) + 1
        column = offset - start + (1 if line else self.column)
        return f"{printable(self.name)}:{self.line + line}:{column}"


def parse_pipeline(text: str, place: Place = Place()) -> list[PassCall]:
    """Read ``"cse, fuse-gemm{max-ops=4}"``; ``#`` starts a comment that ends with the line.

    Raises:
        PassError: ``name:line:column: message``; ``place`` says where the text stands.
    """
    if len(text) > _MAX_PIPELINE:
        raise PassError(f"{place.of(text, 0)}: a pipeline of more than {_MAX_PIPELINE} characters")
    code = _COMMENT.sub(lambda comment: " " * len(comment[0]), text).rstrip().rstrip(",")
    calls, position = [], len(code) - len(code.lstrip())
    while position < len(code):
        try:
            call, position = _read_call(code, position)
        except PassError as error:
            raise PassError(f"{place.of(text, position)}: {error}") from error
        calls.append(call)
    return calls


def _read_call(text: str, position: int) -> tuple[PassCall, int]:
    """One call, and where the next one begins."""
    match = _STEP.match(text, position)
    if match is None:
        raise PassError(
            f"cannot read the pipeline at {text[position : position + 20]!r}; "
            "write pass,pass{option=value}"
        )
    definition = find_pass(match["name"])
    return PassCall(definition, _read_options(definition, match["options"] or "")), match.end()


def _read_options(definition: PassDef, text: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = item.partition("=")
        key = name.strip().replace("-", "_")
        if key not in definition.options:
            known = ", ".join(k.replace("_", "-") for k in definition.options) or "none"
            raise PassError(
                f"pass {definition.name} has no option {name.strip()[:80]!r}; options: {known}"
            )
        options[key] = _read_value(
            value.strip(), definition.options[key], f"{definition.name}{{{item}}}"
        )
    return options


def _read_value(text: str, default: Any, where: str) -> Any:
    if not text.isprintable() or (len(text) > _MAX_VALUE and not isinstance(default, str)):
        raise PassError(f"{where[:80]!r}: no value of an option")
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False, "": True}[text.lower()]
        return type(default)(text) if default is not None else text
    except (KeyError, ValueError) as error:
        raise PassError(f"{where}: {text!r} is no {type(default).__name__}") from error


class PassManager:
    """Runs a pipeline over a graph and keeps the steps (``history``)."""

    def __init__(
        self, pipeline: str | Sequence[PassCall], observers: Sequence[Observer] = ()
    ) -> None:
        self.calls = parse_pipeline(pipeline) if isinstance(pipeline, str) else list(pipeline)
        self.observers = list(observers)
        self.history: list[Step] = []

    def run(self, graph: Graph) -> Graph:
        """The graph after all passes."""
        for index, call in enumerate(self.calls):
            for observer in self.observers:
                observer.before(call, graph, index)
            step = self._step(call, graph)
            self.history.append(step)
            for observer in self.observers:
                observer.after(step, index)
            graph = step.after
        return graph

    def _step(self, call: PassCall, graph: Graph) -> Step:
        start = time.perf_counter()
        outer = fuel.current()
        try:
            with fuel.limit(outer.left if outer else None) as record:
                after = call.definition.run(graph, **call.options)
        except MoecError as error:
            raise type(error)(f"pass {call}: {error}") from error
        if outer is not None:
            outer.spent += record.spent
            outer.left = record.left
        return Step(call, graph, after, time.perf_counter() - start, len(record.spent))
