"""Reading what an experts module computes, from its own code.

An experts module is called as ``forward(x, idx, w)`` and adds, for each token, the outputs of its
chosen experts. Its loop is run with concrete routing (all tokens to one expert) under a recorder,
which leaves a straight-line body; two recordings with different experts and sizes prove that the
body is the same for every expert and every number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from moec.capture.forms import INDICES, Form, planned
from moec.capture.importer import ExpertSlice, Importer
from moec.capture.paths import paths_of, pattern_of
from moec.capture.recorder import ConstantPair, IntegerPair, Recorder, Sizes, merge
from moec.capture.row_weights import split_weight
from moec.errors import CaptureError
from moec.ir.builder import Builder
from moec.ir.dims import Dim, product, substitute
from moec.ir.graph import Value
from moec.ir.types import Type

aten = torch.ops.aten
_ROWS = (5, 7)


@dataclass(frozen=True)
class TokenData:
    """The tokens ("x") or the weights ("w") before the loop picks its rows."""

    name: str


@dataclass(frozen=True)
class ExpertsBody:
    """The body of an experts loop: its graph, the experts' number and the weights that it reads.

    ``weights`` maps each placeholder to the parameter path (stacked weights), or to one path an
    expert (those are ``listed``). ``form`` says what the module is called with, ``first`` is the
    number of its first expert.
    """

    graph: fx.Graph
    experts: int
    hidden: int
    weights: Mapping[str, tuple[str, ...]]
    module_path: str
    form: Form = INDICES
    first: int = 0
    listed: frozenset[str] = frozenset()

    @property
    def shares_weights(self) -> bool:
        """Whether some weight is used whole by every expert."""
        placeholders = (n for n in self.graph.nodes if n.op == "placeholder")
        return any(
            n.name not in self.listed and not _is_cut(n)
            for n in placeholders
            if n.name not in ("x", "w")
        )

    def inline(
        self,
        b: Builder,
        x: Value,
        idx: Value,
        w: Value,
        weight: Callable[[str], Value],
        form: Form | None = None,
    ) -> Value:
        """Append the body for tokens ``x [T, H]``, indices ``idx [T, K]`` and weights ``w [T, K]``,
        or for these in another ``form``; returns ``[T, H]``.
        """
        shape = x.type.shape
        tokens = product(shape[:-1])
        x = x if x.type.rank == 2 else b("t.reshape", x, shape=(tokens, shape[-1]))
        plan, w = planned(b, form or self.form, idx, w, self.experts, tokens)
        importer = _BodyImporter(b, self, *plan, (x, w))
        result = self.import_into(importer, weight)
        if result.type.rank == len(shape):
            return result
        shaped: Value = b("t.reshape", result, shape=(*shape[:-1], result.type.shape[-1]))
        return shaped

    def import_into(self, importer: _BodyImporter, weight: Callable[[str], Value]) -> Value:
        """Append the recorded ops with an importer's rows."""
        for node in self.graph.nodes:
            if node.op == "placeholder":
                known = node.name in ("x", "w")
                importer.env[node] = (
                    TokenData(node.name)
                    if known
                    else _weight(
                        importer.b, self.weights[node.name], node.name in self.listed, weight
                    )
                )
        importer.run(self.graph)
        return importer.combined()


def _weight(
    b: Builder, paths: tuple[str, ...], listed: bool, weight: Callable[[str], Value]
) -> Value | ExpertSlice:
    """A stacked weight, or the experts' weights stacked: then the body has one expert's part."""
    values = [weight(path) for path in paths]
    return ExpertSlice(b("t.stack", *values, hint=values[0].hint)) if listed else values[0]


class _BodyImporter(Importer):
    """Imports a recorded body: indexing by the recorded routing becomes dispatch."""

    def __init__(
        self,
        b: Builder,
        body: ExpertsBody,
        perm: Value,
        offsets: Value,
        inverse: Value,
        data: tuple[Value, Value],
    ) -> None:
        super().__init__(
            b, lambda node: node.meta["shape"], lambda a: a, module_path=body.module_path
        )
        self.body, self.plan, self.data = body, (perm, inverse), data
        self.offsets, self.rows = offsets, perm.type.shape[0]
        self.output = next(n for n in body.graph.nodes if n.op == "output")
        self.added: Value | None = None
        self.on_data: dict[fx.Node, bool] = {}
        self.shape_of = self.shape_in_rows

    def shape_in_rows(self, node: fx.Node) -> tuple[Any, ...]:
        """The recorded shape with the number of rows in place of the recorded symbol."""
        return tuple(self.in_rows(d) for d in node.meta["shape"])

    def in_rows(self, size: Dim) -> Dim:
        """A recorded size with the number of rows in place of the recorded one."""
        choices = self.body.form.choices
        return substitute(size, {"R": self.rows if choices == 1 else self.rows / choices})

    def call(self, node: fx.Node) -> Any:
        special = _SPECIAL.get(node.target)
        found = special(self, node) if special is not None else None
        return found if found is not None else super().call(node)

    def argument(self, argument: Any) -> Any:
        if isinstance(argument, ConstantPair):
            return _number_of(argument)
        if isinstance(argument, IntegerPair):
            return self.in_rows(_SIZES.dim(argument.first, argument.second))
        found = super().argument(argument)
        if isinstance(found, TokenData):
            raise CaptureError("the loop computes on all tokens, not on the rows of one expert")
        return found

    def reads_data(self, node: fx.Node) -> bool:
        """Whether a value depends on the tokens or on the weights of routing, and so has rows."""
        if node not in self.on_data:
            inputs = node.all_input_nodes
            is_data = node.op == "placeholder" and node.name in ("x", "w")
            self.on_data[node] = is_data or any(map(self.reads_data, inputs))
        return self.on_data[node]

    def is_every_row(self, index: Any) -> bool:
        """Whether a recorded index is all rows in order (twice where a token chose twice)."""
        choices = self.body.form.choices
        return isinstance(index, ConstantPair) and all(
            t.dtype == torch.long
            and torch.equal(t.flatten().cpu(), torch.arange(n).repeat(choices))
            for t, n in zip((index.first, index.second), _ROWS, strict=True)
        )

    def rows_of(self, data: TokenData, node: fx.Node) -> Value:
        """The tokens or the weights, one a row, in the shape that the node has."""
        kind, value = (
            ("moe.gather", self.data[0]) if data.name == "x" else ("moe.permute", self.data[1])
        )
        rows: Value = self.b(kind, value, *self.plan, hint="xs" if data.name == "x" else "ws")
        shape = self.shape_in_rows(node)
        reshaped: Value = (
            rows
            if rows.type.shape == shape
            else self.b("t.reshape", rows, shape=shape, hint=rows.hint)
        )
        return reshaped

    def without_dropped(self, rows: Value) -> Value:
        """Rows of no expert as zeros: what all experts share gets no gradient from them."""
        perm, inverse = self.plan
        kept = self.b("t.cast", self.b("t.ge", inverse, other=0), dtype="i32")
        column = self.b(
            "t.reshape", self.b("moe.permute", kept, perm, inverse), shape=(self.rows, 1)
        )
        zero = self.b.full(Type(rows.type.dtype, ()), 0.0)
        masked: Value = self.b("t.where", self.b("t.gt", column, other=0), rows, zero)
        return masked

    def combined(self) -> Value:
        """The sum over the choices of what the body adds; a last row weight goes to the combine."""
        if self.added is None:
            raise CaptureError("the loop adds nothing to its result")
        dtype = self.data[0].type.dtype
        rows, weights = split_weight(self.b, self.added, dtype)
        rows = self.without_dropped(rows) if self.body.shares_weights else rows
        operands = (rows, *self.plan) if weights is None else (rows, *self.plan, self.data[1])
        result: Value = self.b("moe.combine", *operands, dtype=dtype, hint="routed")
        return result


def _is_cut(node: fx.Node) -> bool:
    """Whether all that is read of a weight is one expert's part of it."""
    picks = (aten.select.int, aten.index.Tensor)
    return all(
        user.target in picks or (user.target in _RESHAPES and _is_cut(user)) for user in node.users
    )


def _number_of(pair: ConstantPair) -> Any:
    first, second = pair.first, pair.second
    if first.numel() == 1 and second.numel() == 1 and first.dim() == 0:
        if first.item() != second.item():
            raise CaptureError(
                "a number in the body depends on the expert or on the number of tokens"
            )
        return first.item()
    return pair


def _index(i: _BodyImporter, node: fx.Node) -> Any:
    source, indices = i.env.get(node.args[0]), node.args[1]  # type: ignore[arg-type]
    if isinstance(source, TokenData):
        first = next(index for index in indices if index is not None)  # type: ignore[union-attr]
        if not i.is_every_row(first):
            raise CaptureError("the loop reads its tokens in an order of its own")
        return i.rows_of(source, node)
    if isinstance(source, Value) and len(indices) == 1 and _is_expert(indices[0]):  # type: ignore[index,arg-type]
        return None if i.reads_data(node.args[0]) else _slice_of(i, source, indices[0])  # type: ignore[arg-type,index]
    return None


def _slice_of(i: _BodyImporter, stack: Value, index: Any) -> ExpertSlice:
    """One expert's part of a stack; of a stack that other experts share, these experts' part."""
    low, high = (int(n) for n in (index.first, index.second))
    size = stack.type.shape[0]
    if (low, high + 1) == (0, size):
        return ExpertSlice(stack)
    if high - low + 1 != i.body.experts:
        raise CaptureError(f"experts {low} and {high} of a weight of type {stack.type}")
    return ExpertSlice(i.b("t.slice", stack, dim=0, start=low, stop=high + 1, hint=stack.hint))


def _view(i: _BodyImporter, node: fx.Node) -> Any:
    """A view of the tokens or weights that the loop has not picked rows from yet."""
    source = i.env.get(node.args[0])  # type: ignore[arg-type]
    if isinstance(source, TokenData) and source.name == "x" and node.target in _RESHAPES:
        if node.meta["shape"][-1] != i.body.hidden:
            raise CaptureError("the loop reads its tokens in parts")
    return source if isinstance(source, TokenData) else None


def _is_expert(index: Any) -> bool:
    return isinstance(index, ConstantPair | IntegerPair)


def _select(i: _BodyImporter, node: fx.Node) -> Any:
    operands: Any = node.args[:3]
    source, axis, index = operands
    column = i.body.form.weights == "TE" and axis == 1 and isinstance(index, IntegerPair)
    if column and i.env.get(source) == TokenData("w"):
        return TokenData("w")  # the weight of this expert, which the row has
    stack = i.env.get(source)
    alone = i.body.experts == 1 and isinstance(index, int)
    index = IntegerPair(index, index) if alone else index
    if not isinstance(stack, Value) or axis != 0 or i.reads_data(source):
        return None
    if _is_expert(index) and _is_static(stack):
        return _slice_of(i, stack, index)
    return None


def _is_static(value: Value) -> bool:
    return all(isinstance(size, int) for size in value.type.shape)


def _index_add(i: _BodyImporter, node: fx.Node) -> Any:
    into, axis, index, source = node.args[:4]
    if (
        axis != 0
        or not _is_zero(into)
        or not i.is_every_row(index)
        or node.kwargs.get("alpha", 1) != 1
    ):
        raise CaptureError("index_add into something that is not the zero-filled result")
    i.added = i.env[source]  # type: ignore[index]
    return i.added


def _index_put(i: _BodyImporter, node: fx.Node) -> Any:
    into, indices, source = node.args[:3]
    if not _is_zero(into) or not i.is_every_row(indices[0]):  # type: ignore[index]
        raise CaptureError("index_put into something that is not the zero-filled result")
    i.added = i.env[source]  # type: ignore[index]
    return i.added


def _add(i: _BodyImporter, node: fx.Node) -> Any:
    """``result[index] + rows`` while the result is still zero."""
    operands: Any = node.args[:2]
    a, b = operands
    for constant, value in ((a, b), (b, a)):
        if isinstance(constant, ConstantPair) and _is_zero(constant) and isinstance(value, fx.Node):
            i.added = i.env[value]
            return i.added
    return None


def _is_zero(value: Any) -> bool:
    return isinstance(value, ConstantPair) and not value.first.any() and not value.second.any()


_RESHAPES = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
_SPECIAL: dict[Any, Callable[[_BodyImporter, fx.Node], Any]] = {
    aten.index.Tensor: _index,
    aten.select.int: _select,
    aten.unsqueeze.default: _view,
    **dict.fromkeys(_RESHAPES, _view),
    aten.index_add.default: _index_add,
    aten.index_put.default: _index_put,
    aten.add.Tensor: _add,
}
_SIZES = Sizes({"R": _ROWS})


@dataclass(frozen=True)
class Span:
    """Experts ``first`` up to ``stop`` of ``total``, called in a form with tokens of a width."""

    first: int
    stop: int
    total: int
    form: Form
    hidden: int


def read_span(module: nn.Module, span: Span, path: str = "") -> ExpertsBody:
    """The body that experts of a span have in common; :class:`CaptureError` if they have none."""
    chosen = (span.first, span.stop - 1)
    pairs = [record(module, span, e, n) for e, n in zip(chosen, _ROWS, strict=True)]
    (first, out1), (second, out2) = pairs
    graph = merge(
        first,
        second,
        (out1, out2),
        _SIZES,
        lambda name, which: pattern_of(module, name, chosen[which], span.total),
    )
    sources = {n.name: str(n.meta["source"]) for n in graph.nodes if n.op == "placeholder"}
    known = dict(named_weights(module))
    for name, source in sources.items():
        if name not in ("x", "w") and source not in known:
            raise CaptureError(f"{type(module).__name__} reads the integer buffer {source}")
    weights = {
        n: paths_of(module, s, span.first, span.stop, span.total)
        for n, s in sources.items()
        if n not in ("x", "w")
    }
    listed = frozenset(n for n, found in weights.items() if found is not None)
    known_paths = {n: found or (sources[n],) for n, found in weights.items()}
    count = span.stop - span.first
    return ExpertsBody(graph, count, span.hidden, known_paths, path, span.form, span.first, listed)


def record(module: nn.Module, span: Span, expert: int, rows: int) -> tuple[Recorder, torch.Tensor]:
    """Run a module's code with every token going to one expert; what it did, and the result."""
    parameter = next(module.parameters())
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, span.hidden, generator=generator).to(parameter.device, parameter.dtype)
    idx = span.form.route(rows, expert, span.total).to(parameter.device)
    columns = span.total if span.form.weights == "TE" else span.form.choices
    w = (torch.rand(rows, columns, generator=generator) + 0.5).to(parameter.device)
    recorder = Recorder(skip_empty=True)
    recorder.mark("x", x)
    recorder.mark("w", w)
    for name, tensor in (*named_weights(module), *integer_buffers(module)):
        recorder.mark(name, tensor)
    with torch.no_grad(), recorder, recorder.watching():
        out = module(x, idx, w)
    if recorder.reads:
        raise CaptureError(read_reason(module, recorder.reads[0]))
    if not isinstance(out, torch.Tensor):
        raise CaptureError(f"{type(module).__name__} returns {type(out).__name__}, not one tensor")
    return recorder, out


def named_weights(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and floating-point buffers by path."""
    yield from module.named_parameters()
    yield from ((n, t) for n, t in module.named_buffers() if t.is_floating_point())


def integer_buffers(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The other buffers: code that reads them is not captured, since layers may differ in them."""
    yield from ((n, t) for n, t in module.named_buffers() if not t.is_floating_point())


def read_reason(module: nn.Module, node: fx.Node) -> str:
    """Why a module that turned a recorded value into a Python number is left as it was."""
    place = node.meta.get("location")
    where = f"{place[0]}:{place[1]}: " if place else ""
    return (
        f"{where}{type(module).__name__} reads a value of a tensor as a Python number (in a "
        "branch, item() or tolist()), which a compiled call would not do again; use torch.where "
        "or a tensor"
    )


__all__ = ["ExpertsBody", "Span", "integer_buffers", "named_weights", "read_span", "record"]
