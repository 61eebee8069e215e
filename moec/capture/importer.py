"""From an FX graph of ATen ops to IR: one walk, one table entry an op (``aten.py``)."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from moec.capture.naming import name_nodes
from moec.errors import CaptureError, IRError
from moec.ir.builder import Builder
from moec.ir.dims import Dim
from moec.ir.graph import Location, Value
from moec.ir.types import dtype_name


@dataclass(frozen=True)
class ExpertSlice:
    """One expert's part of a stacked weight; ``stack`` is the whole, ``[E, ...]``."""

    stack: Value

    @property
    def rank(self) -> int:
        """The rank of one expert's part."""
        return self.stack.type.rank - 1


Handler = Callable[["Importer", fx.Node, Sequence[Any], Mapping[str, Any]], Any]
HANDLERS: dict[Any, Handler] = {}


def handles(*targets: Any) -> Callable[[Handler], Handler]:
    """Decorator: this function imports calls of ``targets``."""

    def add(function: Handler) -> Handler:
        for target in targets:
            HANDLERS[target] = function
        return function

    return add


def handler_of(target: Any) -> Handler | None:
    """The table entry of an op."""
    import moec.capture.aten_products  # these register all handlers; they need this module first
    import moec.capture.aten_rows
    import moec.capture.aten_writes
    import moec.capture.einsum  # noqa: F401

    return HANDLERS.get(target)


_SIZES = (int, torch.SymInt, torch.SymFloat, torch.SymBool)  # what tracers compute sizes with


class Importer:
    """Imports the call nodes of one FX graph into a builder.

    ``shape_of(node, index)`` and ``dim_of(argument)`` translate the tracer's sizes to dims;
    ``expert`` (for the body of an experts loop) provides ``offsets`` and ``rows`` of the grouped
    ops.
    """

    def __init__(
        self,
        builder: Builder,
        shape_of: Callable[[fx.Node], tuple[Dim, ...]],
        dim_of: Callable[[Any], Dim],
        *,
        module_path: str = "",
    ) -> None:
        self.b = builder
        self.shape_of = shape_of
        self.dim_of = dim_of
        self.module_path = module_path
        self.env: dict[fx.Node, Any] = {}
        self.offsets: Value | None = None
        self.rows: Dim = 0

    def run(self, graph: fx.Graph) -> None:
        """Import every call; placeholders must be in ``env`` already."""
        name_nodes(graph)
        for node in graph.nodes:
            if node.op == "call_function" and node not in self.env:
                self.b.loc = location_of(node, self.module_path)
                self.env[node] = self.call(node)

    def call(self, node: fx.Node) -> Any:
        """Import one call."""
        if node.target is operator.getitem:
            return self.env[node.args[0]][node.args[1]]  # type: ignore[index]
        if isinstance(node.meta.get("val"), _SIZES):
            return None
        handler = handler_of(node.target)
        if handler is None:
            place = location_of(node, self.module_path) or "the model"
            raise CaptureError(f"{place}: {_unknown(node.target)}")
        args = [self.argument(a) for a in node.args]
        kwargs = {k: self.argument(v) for k, v in node.kwargs.items()}
        try:
            return handler(self, node, args, kwargs)
        except (IRError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise CaptureError(
                f"{location_of(node, self.module_path) or 'the model'}: {node.target}: {error}"
            ) from error

    def argument(self, argument: Any) -> Any:
        """The imported form of an argument: a value, a slice, a dim, or a constant."""
        if isinstance(argument, fx.Node):
            return (
                self.env[argument] if self.env.get(argument) is not None else self.dim_of(argument)
            )
        if isinstance(argument, list | tuple):
            return [self.argument(a) for a in argument]
        return argument

    def hint(self, node: fx.Node) -> str:
        """A name for the node's value: the user's variable if known."""
        name = node.name.split("_default")[0].split("_tensor")[0].lstrip("_")
        return str(node.meta.get("hint", name.rstrip("0123456789").rstrip("_") or node.name))

    def hints(self, node: fx.Node, count: int) -> list[str]:
        """Names for the parts of the node's value."""
        names = node.meta.get("hints", ())
        return (
            list(names) if len(names) == count else [f"{self.hint(node)}_{j}" for j in range(count)]
        )

    def dtype(self, node: fx.Node) -> str:
        """The IR dtype of the node's (first) result."""
        value = node.meta["val"]
        value = value[0] if isinstance(value, tuple | list) else value
        return dtype_name(value.dtype)

    def value(self, argument: Any) -> Value:
        """An operand: a per-expert vector is spread over the expert's rows first."""
        if isinstance(argument, ExpertSlice):
            if argument.rank != 1 or self.offsets is None:
                raise CaptureError(
                    f"a weight of type {argument.stack.type} is used in a way that has no "
                    "grouped form"
                )
            spread: Value = self.b(
                "moe.expert_rows",
                argument.stack,
                self.offsets,
                rows=self.rows,
                hint=argument.stack.hint,
            )
            return spread
        if not isinstance(argument, Value):
            raise CaptureError(f"expected a tensor, got {argument!r}")
        return argument

    def cast(self, value: Value, dtype: str) -> Value:
        """``value`` in a dtype; no op if it has it."""
        if value.type.dtype == dtype:
            return value
        casted: Value = self.b("t.cast", value, dtype=dtype, hint=value.hint)
        return casted


def _unknown(target: Any) -> str:
    if torch.Tag.nondeterministic_seeded in getattr(target, "tags", ()):
        return f"{target} draws random numbers, which only the module's own code does in its order"
    name = (
        target if isinstance(target, torch._ops.OpOverload) else getattr(target, "__name__", target)
    )
    return f"no IR for {name}"


def location_of(node: fx.Node, module_path: str) -> Location | None:
    """The user's source line of a node, from the tracer's stack trace."""
    known = node.meta.get("location")
    if known is not None:
        return Location(known[0], known[1], module_path)
    return parse_stack_trace(node.meta.get("stack_trace") or "", module_path)


def parse_stack_trace(trace: str, module_path: str) -> Location | None:
    """The innermost frame of a Python stack trace as a location."""
    for line in reversed(trace.splitlines()):
        line = line.strip()
        own = "/torch/" in line or "/threading.py" in line  # captures run in a thread of their own
        if line.startswith('File "') and not own:
            path, rest = line[6:].split('"', 1)
            number = rest.split("line ", 1)[-1].split(",", 1)[0]
            if number.isdigit():
                return Location(path.rsplit("/", 1)[-1].replace(" ", "_"), int(number), module_path)
    return None
