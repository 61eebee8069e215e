"""The text of a kernel while it is being written: its lines, and the parameters they need."""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from moec.codegen.names import PythonNames
from moec.codegen.triton import source
from moec.codegen.triton.expressions import CALLED, DTYPES, EXPRESSIONS, number
from moec.codegen.triton.facts import Facts
from moec.codegen.triton.facts import Unsupported as Unsupported
from moec.codegen.triton.layout import WIDTH, wrapped
from moec.codegen.writer import Writer
from moec.ir.graph import Graph, Op, Value
from moec.ir.opdef import opdef
from moec.ir.text import show
from moec.ir.types import Type

# names that the templates use themselves
_LOCALS = frozenset(
    "m n k token row column columns wide depth inside expert matrix start end size tiles left "
    "right acc live live_wide left_at work last at here block slot key best hit "
    "chosen count top none pair first member allowed family families family_key "
    "BM BN BK BC BH BT KP EP BLOCK".split()
)
_FIRST = ("rows", "left_rows", "right_rows", "part 0", "part 1")


@dataclass(frozen=True)
class Term:
    """A value inside a kernel: its text and the axes along which it varies."""

    text: str
    axes: tuple[str, ...] = ()
    literal: bool = False

    def on(self, axes: tuple[str, ...]) -> str:
        """The text, with the missing axes of ``axes`` added to broadcast."""
        if not self.axes or self.axes == axes:
            return self.text
        return f"{self.text}[{', '.join(':' if a in self.axes else 'None' for a in axes)}]"


@dataclass(frozen=True)
class Parameter:
    """A parameter: an operand or result of the op, or something that the host makes (a name)."""

    name: str
    value: Value | str


def fresh_names(free: Sequence[str] = ()) -> PythonNames:
    """Names for a kernel's values: none that the templates or the library use, save ``free``."""
    return PythonNames((_LOCALS | source.names() | {"launch"}) - set(free))


def compute_dtype(graph: Graph) -> str:
    """float64 if a float in the graph is f64, else float32."""
    values = [*graph.inputs, *(v for op in graph.ops for v in op.results)]
    return "tl.float64" if any(v.type.dtype == "f64" for v in values) else "tl.float32"


@dataclass
class KernelText:
    """A kernel under construction."""

    dtype: str
    facts: Facts
    names: PythonNames = field(default_factory=fresh_names)
    lines: Writer = field(default_factory=Writer)
    parameters: list[Parameter] = field(default_factory=list)
    constants: dict[str, int] = field(default_factory=dict)
    integers: list[str] = field(default_factory=list)
    wide: set[str] = field(default_factory=set)  # of these, what 32 bits need not hold
    used: set[str] = field(default_factory=set)

    def parameter(self, value: Value | str, hint: str | None = None) -> str:
        """The name of the parameter for an operand, a result or something of the host's."""
        for p in self.parameters:
            if p.value is value or (isinstance(value, str) and p.value == value):
                return p.name
        wanted = hint or (value if isinstance(value, str) else value.hint)
        name = self.names.fresh(wanted)
        self.parameters.append(Parameter(name, value))
        return name

    def sort(self, body: Graph) -> None:
        """Put the parameters in order: operands as in the body, results, then the host's own."""
        order: dict[Value | str, int] = {name: i - len(_FIRST) for i, name in enumerate(_FIRST)}
        order.update({v: i for i, v in enumerate((*body.inputs, *body.outputs))})
        self.parameters.sort(key=lambda p: order.get(p.value, len(order)))

    def use(self, function: str) -> str:
        """Note that a library function is called; its name."""
        self.used.add(function)
        return function

    def line(self, text: str = "", why: str = "") -> None:
        """One line of the body, broken if it is long, and the fact that it rests on."""
        self.lines.lines(*explained(text, why, WIDTH - 12))

    def held(self, type_: Type, text: str) -> str:
        """A load, converted to the dtype in which the kernel computes."""
        wanted = dtype_in_kernel(type_, self.dtype)
        return text if DTYPES[type_.dtype] == wanted else f"{text}.to({wanted})"

    @contextlib.contextmanager
    def block(self, head: str) -> Iterator[None]:
        """``head`` and an indented block."""
        with self.lines.block(head):
            yield

    def let(self, hint: str, text: str, axes: tuple[str, ...] = (), why: str = "") -> Term:
        """A new local with this text."""
        name = self.names.fresh(hint)
        self.line(f"{name} = {text}", why)
        return Term(name, axes)

    def literal(self, op: Op) -> Term:
        """A constant."""
        value = op.attrs["value"]
        if not op.result.type.is_float:
            return Term(repr(int(value)), literal=True)
        return Term(number(float(value), self.dtype), literal=True)

    def pointwise(self, op: Op, terms: Sequence[Term], order: tuple[str, ...]) -> Term:
        """The result of a pointwise op on terms; ``order`` is that of the axes."""
        axes = tuple(a for a in order if any(a in t.axes for t in terms))
        texts = [t.on(axes) for t in terms]
        if all(t.literal for t in terms):
            texts[0] = (
                f"tl.full((), {texts[0]}, {dtype_in_kernel(op.operands[0].type, self.dtype)})"
            )
        text = EXPRESSIONS[op.kind](op, texts, self.dtype)
        self.used.update(f for f in CALLED if f"{f}(" in text)
        if text in texts:  # a cast that rounds nothing
            return terms[texts.index(text)]
        return self.let(op.result.hint, text, axes)

    def signature(self, name: str) -> str:
        """The ``def`` line, wrapped."""
        items = [p.name for p in self.parameters]
        items += [f"{i}: tl.int64" if i in self.wide else i for i in self.integers]
        items += [f"{k}: tl.constexpr = {v}" for k, v in self.constants.items()]
        return "\n".join(wrapped(f"def {name}({', '.join(items)}):", WIDTH))

    def write(
        self, writer: Writer, name: str, docs: Sequence[str], *, launched: bool = True
    ) -> None:
        """The whole kernel, or (not ``launched``) a function that kernels call."""
        integers = ", ".join(f'"{i}"' for i in self.integers)
        decorator = f"(do_not_specialize=[{integers}])" if integers else ""
        writer.lines("", "", *(["@launch.Kernel"] if launched else []), f"@triton.jit{decorator}")
        with writer.block(self.signature(name)):
            if len(docs) == 1:
                writer.line(f'"""{docs[0]}"""')
            else:
                writer.lines(f'"""{docs[0]}', *docs[1:], '"""')
            writer.lines(*self.lines.text().rstrip("\n").split("\n"))


def explained(text: str, why: str, width: int) -> list[str]:
    """A line of code with a comment: behind it, or above it where there is no room."""
    lines = wrapped(text, width)
    if not why:
        return lines
    if len(lines) == 1 and len(text) + len(why) + 4 <= width:
        return [f"{text}  # {why}"]
    return [*(f"# {part}" for part in textwrap.wrap(why, width - 2)), *lines]


def assigned(name: str, explained: tuple[str, str]) -> tuple[str, str]:
    """An assignment of an expression, and the fact behind it."""
    text, why = explained
    if text.startswith("(") and why.startswith("32"):  # there is no cast of what it encloses
        text = text[1:-1]
    return f"{name} = {text}", why


def dtype_in_kernel(type_: Type, dtype: str) -> str:
    """The dtype in which a kernel holds values of a type."""
    return dtype if type_.is_float else DTYPES[type_.dtype]


def documentation(op: Op, extra: Sequence[str] = ()) -> list[str]:
    """A kernel's docstring: what it computes, where the model says so, and its tile."""
    if op.body is None:
        return []
    text = show(op.body, locations=False).rstrip().replace("\\", "\\\\").replace('"""', "'''")
    place = [str(op.loc).replace("\\", "/").replace('"""', "'''")] if op.loc is not None else []
    lines = [part for line in extra for part in textwrap.wrap(line, WIDTH - 4)]
    return [*text.split("\n"), "", *place, *lines]


def is_pointwise(op: Op) -> bool:
    """Whether an op is elementwise."""
    return opdef(op.kind).pointwise


def needed_ops(graph: Graph, wanted: Sequence[Value], known: set[Value]) -> list[Op]:
    """The ops that ``wanted`` depends on, in order, going no further back than ``known``."""
    live, found = set(wanted) - known, []
    for op in reversed(graph.ops):
        if any(v in live for v in op.results):
            found.append(op)
            live |= set(op.operands) - known
    return found[::-1]
