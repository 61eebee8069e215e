"""The ``triton`` target: a kernel for each ``kern.`` op, and the host lines that launch it."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from moec.codegen.gluon.grouped_gemm import GluonGemm
from moec.codegen.gluon.grouped_outer import GluonOuter
from moec.codegen.gluon.text import IMPORTS
from moec.codegen.host import emit_aten, partition
from moec.codegen.names import PythonNames
from moec.codegen.requirements import Requirement
from moec.codegen.triton import source
from moec.codegen.triton.combine import Combine
from moec.codegen.triton.context import Context, Gathered, RowList
from moec.codegen.triton.descriptor_gemm import DescriptorGemm
from moec.codegen.triton.descriptor_outer import DescriptorOuter
from moec.codegen.triton.facts import Facts
from moec.codegen.triton.few_linear import LIBRARY as FEW_LINEAR
from moec.codegen.triton.few_linear import ask as ask_few_linear
from moec.codegen.triton.few_linear import emit_few_linear, is_few_linear
from moec.codegen.triton.group_sum import LIBRARY as GROUP_SUM
from moec.codegen.triton.group_sum import ask, emit_group_sum
from moec.codegen.triton.grouped_gemm import PointerGemm
from moec.codegen.triton.grouped_outer import PointerOuter
from moec.codegen.triton.hoist import Hoisted, hoist
from moec.codegen.triton.invariance import check_library_op, check_ops, is_invariant
from moec.codegen.triton.kernel import Unsupported
from moec.codegen.triton.picks import LIBRARY as PICKS
from moec.codegen.triton.picks import ask_picks, emit_picks
from moec.codegen.triton.pointwise import Pointwise
from moec.codegen.triton.routing import ONE_PROGRAM, Routing
from moec.codegen.triton.row_sums import LIBRARY as ROW_SUMS
from moec.codegen.triton.row_sums import ask_row_sum, emit_row_sum, is_row_sum
from moec.codegen.triton.tail import leak
from moec.codegen.triton.tokens import Tokens
from moec.codegen.writer import Writer
from moec.ir.graph import Graph, Op, Value, walk
from moec.ir.prove import narrowed
from moec.ir.text import show

_PARTS = ("sums", "tile", "load", "multiply")  # the functions of one kernel


class Kernel(Protocol):
    """One ``kern.`` op as kernels and host lines."""

    name: str
    facts: Facts

    @property
    def library(self) -> set[str]: ...

    def define(self, writer: Writer) -> None: ...

    def launch(self, writer: Writer, context: Context) -> None: ...


class TritonEmitter:
    """Emits the kernels of a graph, and then, op by op, the lines that launch them; ``functions``
    are the ops of each function, in the order in which they are written: by default of ``forward``
    and ``backward``.
    """

    def __init__(self, graph: Graph, functions: Sequence[Sequence[Op]] = ()) -> None:
        program = partition(graph)
        self.graph, self.functions = graph, functions or (program.forward, program.backward)
        self.kernels: dict[Op, Kernel] = {}
        self.reasons: dict[Op, str] = {}
        self.hoisted: dict[Op, Hoisted] = {}
        self.group_sums: dict[Op, Facts] = {}
        self.few_linears: dict[Op, Facts] = {}
        self.picks: dict[Op, Facts] = {}
        self.row_sums: dict[Op, Facts] = {}
        self.ranges = graph.ranges  # as far as is known from what other kernels ask
        self.first: dict[str, Kernel] = {}  # the kernel that others of the same text share
        self.repro = is_invariant(graph)
        if self.repro:
            check_ops(graph)
        self._contexts: list[Context] = []
        self._taken = set(source.names())
        self._hints = {_clean(v.hint) for v in _values(graph)}
        for op in graph.ops:
            if op.kind.startswith("kern."):
                self._plan(op)
        for op in walk(graph):
            with contextlib.suppress(Unsupported):
                if op.kind == "moe.group_sum" and op.result.type.rank == 2:
                    self.group_sums[op] = ask(op, self.ranges)
                if op.kind == "moe.dispatch_picks":
                    self.picks[op] = ask_picks(op, self.ranges)
                if self.repro and is_row_sum(op) and op in self._apart:
                    self.row_sums[op] = ask_row_sum(op, self.ranges)
                if self.few and op in graph.ops and is_few_linear(op):
                    self.few_linears[op] = ask_few_linear(op, self.ranges)

    @property
    def names(self) -> frozenset[str]:
        """Names that no value may take."""
        return frozenset(self._taken)

    @property
    def requirements(self) -> list[Requirement]:
        """What the kernels ask of sizes."""
        kernels = [k.facts for k in self.kernels.values()]
        others = (self.group_sums, self.few_linears, self.picks, self.row_sums)
        facts = [*kernels, *(f for found in others for f in found.values())]
        return [r for f in facts for r in f.required]

    def _plan(self, op: Op) -> None:
        key = _key(op)
        name = self.first[key].name if key in self.first else self._name(op)
        try:
            reader = leak(self.graph, op) if op.kind == "kern.grouped_gemm" else ""
            if reader:
                raise Unsupported(f"rows without an expert are read by {reader}")
            self.hoisted[op] = hoist(op)
            kernel = self._kernel(self._in_ranges(self.hoisted[op].op), name)
        except Unsupported as error:
            self.reasons[op] = str(error)
            return
        self.kernels[op] = kernel
        self.ranges = narrowed(self.ranges, kernel.facts.checked)
        if key not in self.first:
            self.first[key] = kernel
            self._taken |= {name, *(f"{name}_{part}" for part in _PARTS)}

    def _in_ranges(self, op: Op) -> Op:
        """An op whose body has the ranges that ``forward`` checks."""
        body = op.body
        return op if body is None else replace(op, body=replace(body, ranges=self.ranges))

    def _kernel(self, op: Op, name: str) -> Kernel:
        match op.kind:
            case "kern.grouped_gemm" if _gluon(op):
                return GluonGemm(op, name)
            case "kern.grouped_outer" if _gluon(op):
                return GluonOuter(op, name)
            case "kern.grouped_gemm":
                return DescriptorGemm(op, name) if _tma(op) else PointerGemm(op, name)
            case "kern.grouped_outer":
                return DescriptorOuter(op, name) if _tma(op) else PointerOuter(op, name)
            case "kern.combine":
                return Combine(op, name)
            case "kern.pointwise" if any(o.kind == "t.scatter_add" for o in _ops(op)):
                return Tokens(op, name)
            case "kern.pointwise":
                return Pointwise(op, name)
            case "kern.routing":
                return Routing(op, name, self._emit_inner)
        raise Unsupported(f"no template for {op.kind}")

    def _name(self, op: Op) -> str:
        """A kernel's name: the last part of the module's, and what it computes."""
        module = op.loc.module.split(".")[-1] if op.loc is not None else ""
        hints = dict.fromkeys(re.sub(r"_\d+$", "", _clean(r.hint)) for r in op.results)
        words = ["route"] if op.kind == "kern.routing" else list(hints)
        base = _clean("_".join([module or "moe", *words]))[:40].strip("_").lower()
        name, count = base, 1
        while name in self._taken or f"{name}_sums" in self._taken or self._is_a_value(name):
            count += 1
            name = f"{base}_{count}"
        return name

    def _is_a_value(self, name: str) -> bool:
        """Whether a value may be called so in a function that launches the kernel."""
        return name in self._hints or re.sub(r"_\d+$", "", name) in self._hints

    # writing
    def emit_kernels(self, writer: Writer) -> None:
        """Write every kernel, after the library functions that they use."""
        used = {GROUP_SUM} if self.group_sums else set()
        used |= {FEW_LINEAR} if self.few_linears else set()
        used |= {PICKS} if self.picks else set()
        used |= {ROW_SUMS} if self.row_sums else set()
        for kernel in self.kernels.values():
            used |= kernel.library
        if any(_gluon(op) for op in self.kernels):
            writer.lines("", *IMPORTS)
        for text in source.texts(used):
            writer.lines("", "", text)
        for kernel in self.first.values():
            kernel.define(writer)
        writer.lines("", "")

    def emit_op(self, writer: Writer, op: Op, names: PythonNames) -> bool:
        """Write the lines of an op; false if it is left to its PyTorch expression."""
        context = self._context(op, names)
        if op in self.kernels:
            self._emit_before(writer, op, context)
            self.kernels[op].launch(writer, context)
            return True
        if op in self.reasons:
            self._emit_body(writer, op, context)
            return True
        done = self._emit_special(writer, op, context)
        if self.repro and not done:
            check_library_op(self.graph, op)
        return done

    @functools.cached_property
    def _apart(self) -> frozenset[Op]:
        """The ops that are in no kernel."""
        alone = [k.op for k in self.kernels.values() if isinstance(k, Routing) and not k.scores]
        before = (o for h in self.hoisted.values() for o in h.before)
        inside = (o for op in (*self.reasons, *alone) for o in _ops(op))
        return frozenset((*self.graph.ops, *before, *inside))

    @functools.cached_property
    def few(self) -> bool:
        """Whether the graph was lowered for few tokens."""
        return any(op.attrs.get("template") == ONE_PROGRAM for op in self.graph.ops)

    def _emit_special(self, writer: Writer, op: Op, context: Context) -> bool:
        if op in self.few_linears:
            emit_few_linear(writer, op, context)
            return True
        if op in self.row_sums:
            emit_row_sum(writer, op, context, self.row_sums[op])
            return True
        if op in self.picks:
            emit_picks(writer, op, context, self.picks[op])
            return True
        if op in self.group_sums:
            emit_group_sum(writer, op, context, self.group_sums[op])
            return True
        return False

    def _emit_before(self, writer: Writer, op: Op, context: Context) -> None:
        """The ops of a body that run before its kernel."""
        before = self.hoisted[op].before
        if op.body is None or not before:
            return
        for inner, outer in zip(op.body.inputs, op.operands, strict=True):
            context.names.alias(inner, context.names[outer])
        for o in before:
            self._emit_inner(writer, o, context)
            for v in o.results:
                writer.line(f"{context.names[v]} = {context.names[v]}.contiguous()")
        for inner, outer in zip(op.body.outputs, op.results, strict=True):
            if any(inner in o.results for o in before):
                context.names.alias(outer, context.names[inner])

    def _emit_inner(self, writer: Writer, op: Op, context: Context) -> None:
        """An op of a body as an expression."""
        if not self._emit_special(writer, op, context):
            if self.repro:
                bodies = (o.body for o in self.graph.ops if o.body is not None)
                check_library_op(next(body for body in bodies if op in body.ops), op)
            emit_aten(writer, op, context.names)

    def _emit_body(self, writer: Writer, op: Op, context: Context) -> None:
        """A whole body as expressions: for what no template takes."""
        if op.body is None:
            return
        writer.line(f"# no kernel: {self.reasons[op]}")
        for inner, outer in zip(op.body.inputs, op.operands, strict=True):
            context.names.alias(inner, context.names[outer])
        for o in op.body.ops:
            self._emit_inner(writer, o, context)
        for inner, outer in zip(op.body.outputs, op.results, strict=True):
            context.names.alias(outer, context.names[inner])

    def _context(self, op: Op, names: PythonNames) -> Context:
        for context in self._contexts:
            if context.names is names:
                return context
        # an op may be in several functions, and only those that are not yet written can follow
        ops = next(ops for ops in self.functions[len(self._contexts) :] if op in ops)
        uses, lists = self._gathered_uses(ops), self._row_lists(ops)
        context = Context(self.graph, names, uses, lists, self.repro)
        self._contexts.append(context)
        return context

    def _row_lists(self, ops: Sequence[Op]) -> list[RowList]:
        """The lists of row tiles that the kernels of some ops read, in the order of their use."""
        found: list[RowList] = []
        for op in ops:
            kernel = self.kernels.get(op)
            if isinstance(kernel, PointerGemm | DescriptorGemm | GluonGemm):
                outer = dict(zip(kernel.product.body.inputs, kernel.op.operands, strict=True))
                found.append(kernel.row_list(outer))
        return found

    def _gathered_uses(self, ops: Sequence[Op]) -> dict[Gathered, int]:
        """How many kernels by descriptors read each gathered value."""
        uses: dict[Gathered, int] = {}
        for op in ops:
            taken = self.hoisted[op].op if op in self.kernels else op
            if taken.body is not None and _tma(taken):
                outer = dict(zip(taken.body.inputs, taken.operands, strict=True))
                for inner in taken.body.ops:
                    if inner.kind == "moe.gather":
                        key = outer[inner.operands[0]], outer[inner.operands[1]]
                        uses[key] = uses.get(key, 0) + 1
        return uses


def _tma(op: Op) -> bool:
    return bool(op.attrs.get("template") == "tma")


def _ops(op: Op) -> tuple[Op, ...]:
    return op.body.ops if op.body is not None else ()


def _gluon(op: Op) -> bool:
    return bool(op.attrs.get("template") == "gluon")


def _key(op: Op) -> str:
    body = show(op.body, locations=False) if op.body is not None else ""
    return f"{op.kind} {sorted(op.attrs.items())} {body}"


def _clean(text: str) -> str:
    name = re.sub(r"[^A-Za-z0-9_]", "_", text).strip("_") or "value"
    return f"v{name}" if name[0].isdigit() else name


def _values(graph: Graph) -> list[Value]:
    return [*graph.inputs, *graph.cotangents, *(v for op in walk(graph) for v in op.results)]
