"""What the host lines of one emitted function share: row tiles, gathered rows, last uses."""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field

from moec.codegen import aten
from moec.codegen.names import PythonNames
from moec.codegen.triton.facts import SPREAD
from moec.codegen.triton.kernel import KernelText, Parameter
from moec.codegen.triton.layout import WIDTH, wrapped
from moec.codegen.triton.tiles import power_of_two
from moec.codegen.writer import Writer
from moec.ir.dims import Dim, python_source, symbols
from moec.ir.graph import Graph, Op, Value, producers

# ops whose results are contiguous whatever their operands are
_FRESH = {"t.full", "t.stack", "t.concat", "t.one_hot", "moe.gather", "moe.group_sum"}
_PRODUCTS = {"t.linear", "t.matmul"}
# ops whose results may be views of other strides
_VIEWS = {"t.split", "t.slice", "t.permute", "t.expand"}

Gathered = tuple[Value, Value]  # tokens, perm


def write(writer: Writer, text: str) -> None:
    """A host line inside ``if T:``, broken if it is long."""
    writer.lines(*wrapped(text, WIDTH - 8))


def remarks(writer: Writer, texts: Sequence[str]) -> None:
    """Comments among the host lines."""
    for text in texts:
        writer.lines(*(f"# {part}" for part in textwrap.wrap(text, WIDTH - 8)))


def only_if(rows: Dim) -> str:
    """The condition that there is any row."""
    names = sorted(symbols(rows))
    is_multiple = not isinstance(rows, int) and (
        rows.is_Symbol or (rows.is_Mul and all(a.is_Integer or a.is_Symbol for a in rows.args))
    )
    return names[0] if len(names) == 1 and is_multiple else python_source(rows)


@dataclass(frozen=True)
class RowList:
    """A list of row tiles that a kernel reads: of which offsets, how many rows a tile has, and
    whether it says where each tile's expert ends.
    """

    offsets: Value
    rows: int
    has_ends: bool = False

    @property
    def key(self) -> tuple[Value, int]:
        """As a context knows it."""
        return self.offsets, -self.rows if self.has_ends else self.rows


@dataclass
class Context:
    """The state of one function (``forward`` or ``backward``) while its lines are written."""

    graph: Graph
    names: PythonNames
    uses: dict[Gathered, int]  # how many kernels still read the gathered rows
    wanted: Sequence[RowList] = ()  # the lists of row tiles that the function's kernels read
    repro: bool = False  # whether a kernel has one form only, wherever its arguments lie
    rows: dict[Gathered, str] = field(default_factory=dict)
    tiles: dict[tuple[Value, int], str] = field(default_factory=dict)
    checked: set[Value] = field(default_factory=set)

    def contiguous(self, writer: Writer, values: Sequence[Value]) -> None:
        """Copy what an expression may have left in another order: kernels read row by row."""
        for value in dict.fromkeys(values):
            if value in self.checked:
                continue
            self.checked.add(value)
            if self.repro and self._is_of_a_call(value):
                writer.line(f"{self.names[value]} = launch.aligned({self.names[value]})")
            elif not self._is_contiguous(value):
                writer.line(f"{self.names[value]} = {self.names[value]}.contiguous()")

    def _is_of_a_call(self, value: Value) -> bool:
        """Whether a value comes with each call, from wherever it lies."""
        given = value in self.graph.inputs or value in self.graph.cotangents
        return given and not isinstance(value.type.elements, int)

    def _is_contiguous(self, value: Value) -> bool:
        """Whether a value is row-major in any case; inputs are, since artifacts see to it."""
        op = self._made.get(value)
        if op is None or op.kind.startswith("kern.") or op.kind in _FRESH:
            return True
        if op.kind in _PRODUCTS:
            return all(v.type.rank <= 2 for v in op.operands)
        return op.kind not in _VIEWS and all(self._is_contiguous(v) for v in op.operands)

    @functools.cached_property
    def _made(self) -> dict[Value, Op]:
        return producers(self.graph)

    def allocate(self, writer: Writer, value: Value) -> str:
        """A line that makes room for a result."""
        return self.empty(writer, self.names.add(value), value.type.shape, value.type.dtype)

    def empty(self, writer: Writer, name: str, dims: Sequence[Dim], dtype: str) -> str:
        """A line that makes an uninitialised tensor."""
        size, kind = aten.shape(tuple(dims)), aten.dtype(dtype)
        writer.line(f"{name} = torch.empty({size}, dtype={kind}, device=device)")
        return name

    def row_list(self, writer: Writer, wanted: RowList, rows: Dim) -> str:
        """The name of a list of row tiles of ``rows`` rows; it is made at the first use."""
        if wanted.key not in self.tiles:
            name, experts = self.room_for(writer, wanted, rows), _experts(wanted)
            sizes = f"E={experts}, EP={power_of_two(experts)}, BM={wanted.rows}"
            function = "list_row_places" if wanted.has_ends else "list_row_tiles"
            inner = f"{self.names[wanted.offsets]}, {name}, {sizes}"
            with writer.block(f"if {only_if(rows)}:"):
                write(writer, f"{function}[({experts},)]({inner})")
        return self.tiles[wanted.key]

    def room_for(self, writer: Writer, wanted: RowList, rows: Dim) -> str:
        """A line that makes room for a list of row tiles, which is there from now on."""
        kind = "places" if wanted.has_ends else "tiles"
        name, sizes = self.names.fresh(kind), f"{python_source(rows)}, {_experts(wanted)}"
        writer.line(f"{name} = launch.empty_row_{kind}({sizes}, {wanted.rows}, device)")
        self.tiles[wanted.key] = name
        return name

    def gathered(self, writer: Writer, x: Value, perm: Value, inverse: Value) -> str:
        """The name of the tokens of ``x`` in the order of the rows; copied at the first use."""
        if (x, perm) not in self.rows:
            name = self.names.fresh(f"{self.names[x]}_rows")
            columns, choices = int(x.type.shape[1]), int(inverse.type.shape[1])
            self.empty(writer, name, (perm.type.shape[0], columns), x.type.dtype)
            block = min(SPREAD, power_of_two(columns))
            tokens = python_source(x.type.shape[0])
            sizes = f"H={columns}, K={choices}, BH={block}"
            grid = f"({tokens}, {-(-columns // block)})"
            arguments = f"{self.names[x]}, {self.names[inverse]}, {name}, {sizes}"
            with writer.block(f"if {only_if(perm.type.shape[0])}:"):
                write(writer, f"spread_rows[{grid}]({arguments})")
            self.rows[x, perm] = name
        return self.rows[x, perm]

    def release(self, writer: Writer, x: Value, perm: Value) -> None:
        """One reader of gathered rows is done; after the last their memory is free."""
        self.uses[x, perm] -= 1
        if self.uses[x, perm] == 0 and (x, perm) in self.rows:
            writer.line(f"del {self.rows.pop((x, perm))}")


def arguments(text: KernelText, op: Op, context: Context, made: dict[str, str]) -> list[str]:
    """The launch's arguments: the op's operands and results by name, and what the host made."""
    if op.body is None:
        return []
    outer = dict(zip(op.body.inputs, op.operands, strict=True))
    outer.update(zip(op.body.outputs, op.results, strict=True))

    def name(p: Parameter) -> str:
        return made[p.value] if isinstance(p.value, str) else context.names[outer[p.value]]

    return [name(p) for p in text.parameters]


def _experts(wanted: RowList) -> int:
    return int(wanted.offsets.type.shape[0]) - 1
