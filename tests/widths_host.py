"""The host lines of an emitted module, run on sizes that are intervals: what kernels are given.

``forward`` and ``backward`` are executed with stand-ins for torch, Triton and the runtime. The
number of tokens is any that the emitted checks let through, and nothing else is assumed of it.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from moec.ir.dims import Dim, evaluate, parse_dim
from moec.ir.graph import Graph, Value
from moec.ir.types import DTYPES
from moec.runtime.guards import MOST_PROCESSORS
from tests.widths import Int, Other, Pointer, Span, Tensor, combine, number, one
from tests.widths_kernel import Fault, Kernels

INTEGERS = {"index", "picks"}
UNCHECKED = 2**40  # tokens that nothing refuses


class Size:
    """A size of the host: an interval with Python's arithmetic."""

    def __init__(self, low: int, high: int) -> None:
        self.span = Span(low, high)

    def _with(self, sign: str, other: Any, turned: bool = False) -> Size:
        a, b = (span(other), self.span) if turned else (self.span, span(other))
        if sign == "//":  # Python's, which rounds down
            found = [x // y for x in (a.low, a.high) for y in (b.low, b.high) if y]
            return Size(min(found), max(found))
        found_span = combine(sign, a, b)
        return Size(found_span.low, found_span.high)

    def __add__(self, other: Any) -> Size:
        return self._with("+", other)

    def __sub__(self, other: Any) -> Size:
        return self._with("-", other)

    def __rsub__(self, other: Any) -> Size:
        return self._with("-", other, True)

    def __mul__(self, other: Any) -> Size:
        return self._with("*", other)

    def __floordiv__(self, other: Any) -> Size:
        return self._with("//", other)

    def __neg__(self) -> Size:
        return Size(-self.span.high, -self.span.low)

    def __bool__(self) -> bool:
        return self.span.high > 0

    __radd__, __rmul__ = __add__, __mul__


def span(value: Any) -> Span:
    """The interval of a size."""
    return value.span if isinstance(value, Size) else one(int(value))


def smallest(*sizes: Any) -> Size:
    """``min`` on sizes."""
    found = span(sizes[0])
    for other in sizes[1:]:
        found = combine("min", found, span(other))
    return Size(found.low, found.high)


class Stub:
    """Anything that the host calls and no kernel's width depends on."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Stub()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return Stub()

    def __getitem__(self, key: Any) -> Any:
        return Stub()

    def _same(self, *args: Any) -> Stub:
        return Stub()

    __add__ = __radd__ = __mul__ = __rmul__ = __sub__ = __rsub__ = __truediv__ = _same
    __rtruediv__ = __matmul__ = __rmatmul__ = __neg__ = __and__ = __or__ = __invert__ = _same
    __lt__ = __gt__ = __le__ = __ge__ = _same


class Array(Stub):
    """A tensor of the host."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.shape = tensor, tensor.shape

    def contiguous(self) -> Array:
        """Itself: a copy holds the same."""
        return self

    def zero_(self) -> Array:
        """Itself."""
        return self


def bits_of(dtype: Any) -> int:
    """The bits of an integer dtype, 0 for floats."""
    return {"torch.int32": 32, "torch.int64": 64}.get(str(dtype), 0)


class Torch(Stub):
    """``torch``: makes arrays, and nothing else that matters."""

    def __init__(self) -> None:
        self.int32, self.int64 = "torch.int32", "torch.int64"

    def empty(self, shape: tuple[Any, ...], dtype: Any = None, device: Any = None) -> Array:
        """An array."""
        return Array(Tensor(tuple(shape), bits_of(dtype) if isinstance(dtype, str) else 0))

    zeros = empty

    def full(
        self, shape: tuple[Any, ...], value: Any, dtype: Any = None, device: Any = None
    ) -> Any:
        """An array of one number."""
        return self.empty(shape, dtype)


class Library(Stub):
    """``moec.runtime.grouped``: of one group it is known where it begins and ends."""

    def one_group(self, rows: Any, device: Any) -> Array:
        """The offsets of one group."""
        return Array(Tensor((2,), 32, everywhere(0, span(rows).high), ascending=True))


class Launch:
    """``moec.runtime.launch`` on intervals."""

    def empty_row_tiles(self, rows: Any, experts: int, block: int, device: Any) -> Array:
        return _table(rows, experts, block, 2)

    def empty_row_places(self, rows: Any, experts: int, block: int, device: Any) -> Array:
        return _table(rows, experts, block, 3)

    def row_grid(self, rows: Any, experts: int, block: int, columns: int) -> tuple[Any]:
        return (row_tile_bound(rows, experts, block) * columns,)

    def persistent_rows(
        self, rows: Any, experts: int, block: int, columns: int, device: Any
    ) -> tuple[Any]:
        return self.persistent(row_tile_bound(rows, experts, block) * columns, device)

    def persistent(self, pieces: Any, device: Any) -> tuple[Any]:
        return (Size(1, min(MOST_PROCESSORS, span(pieces).high)),)

    def aligned(self, tensor: Any) -> Any:
        return tensor

    def matrix(self, *args: Any, **kwargs: Any) -> Stub:
        return Stub()

    ragged = blocks = ragged_blocks = matrix


def row_tile_bound(rows: Any, experts: int, block: int) -> Any:
    """As the runtime's."""
    return (rows + smallest(experts, rows) * (block - 1)) // block


def _table(rows: Any, experts: int, block: int, numbers: int) -> Array:
    """A list of row tiles: their number, then expert, first row (and end) of each."""
    most, bound = span(rows).high, span(row_tile_bound(rows, experts, block)).high
    expert, row = Span(0, experts - 1), Span(0, most)

    def contents(place: Span) -> Span:
        if place.is_one and place.low == 0:
            return Span(0, bound)
        if place.step % numbers or place.low < 1:
            return Span(0, max(bound, most, experts))
        first = 0 if numbers == 2 else 1  # behind the number of tiles come the tiles
        return expert if place.rest % numbers == first and place.low >= 1 else row

    return Array(Tensor((), 32, contents))


@dataclass
class Host:
    """What one emitted module launches, for all sizes that it does not refuse."""

    source: str
    graph: Graph
    high: int = UNCHECKED
    function: str = ""  # look at the kernel that this is a part of alone, if there is one
    kernels: Kernels = field(init=False)
    launches: list[Any] = field(init=False, default_factory=list)
    given: list[tuple[str, Mapping[str, Any]]] = field(init=False, default_factory=list)
    checks: list[tuple[Dim, int]] = field(init=False, default_factory=list)
    sizes: dict[str, Size] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        tree = ast.parse(self.source)
        functions = {n.name: n for n in tree.body if isinstance(n, ast.FunctionDef)}
        constants = {"RAGGED": 2**30}
        self.kernels = Kernels(functions, constants)
        names = [n for n in ("forward", "backward") if n in functions]
        self.host: dict[str, ast.FunctionDef] = {n: functions.pop(n) for n in names}

    def run(self) -> Host:
        """Read the checks of ``forward``, then follow both functions."""
        names = {s.name for v in self.graph.inputs for d in v.type.shape for s in _symbols(d)}
        self.sizes = {n: Size(0, self.high) for n in names}
        inputs = [self.array(v) for v in self.graph.inputs]
        self.execute("forward", inputs)
        self.launches, self.given = [], []
        self.sizes = {n: Size(1, max(1, self._most(n))) for n in names}  # none: nothing to launch
        inputs = [self.array(v) for v in self.graph.inputs]
        _, saved = self.execute("forward", inputs)
        if "backward" in self.host:
            kept = [inputs[i] for i in self._backward_inputs()]
            cotangents = [self.array(v) for v in self.graph.cotangents]
            self.execute("backward", [*kept, *saved, *cotangents])
        for name, given in self.given:  # once it is known what every tensor holds
            self.trust(name, given)
        for launch in self.launches:
            if self.function.startswith(launch[0]) or not self._launches_one():
                self.kernels.launch(*launch)
        return self

    def _launches_one(self) -> bool:
        return any(self.function.startswith(name) for name, *_ in self.launches)

    def trust(self, name: str, given: Mapping[str, Any]) -> None:
        """What no interval shows, since it adds up over rounds of a loop.

        Counts of an expert's pairs; and the stages of products over rows, of which every expert
        has as many as its rows need, for each tile.
        """
        if name == "scan_counts":
            self.kernels.trusted["scan_counts", "carry"] = given["histogram"].tensor.total
        for part, counter in (("load", "filled"), ("multiply", "taken")):
            function = self.kernels.functions.get(f"{name}_{part}")
            loops = [n for n in ast.walk(function) if isinstance(n, ast.For)] if function else []
            if len(loops) == 2 and ast.unparse(loops[1].iter) == "range(0, size, BK)":
                arrays = [a.tensor for a in given.values() if isinstance(a, Array)]
                most = self._stages(loops[0], next(a for a in arrays if a.ascending))
                self.kernels.trusted[f"{name}_{part}", counter] = most

    def _stages(self, work: ast.For, offsets: Tensor) -> int:
        """The stages of all tiles, 64 rows each."""
        pieces = int(ast.unparse(work.iter).split(", ")[1])
        experts, rows = int(offsets.shape[0]) - 1, offsets.contents(one(1)).high
        return pieces // experts * int(span(row_tile_bound(rows, experts, 64)).high)

    @property
    def faults(self) -> list[Fault]:
        """The operations that can overflow."""
        return list(self.kernels.faults)

    def _backward_inputs(self) -> tuple[int, ...]:
        tree = ast.parse(self.source)
        for node in tree.body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "BACKWARD_INPUTS":
                return tuple(ast.literal_eval(node.value))
        return ()

    def array(self, value: Value) -> Array:
        """An argument of the emitted functions."""
        shape = tuple(d if isinstance(d, int) else self.size(d) for d in value.type.shape)
        return Array(Tensor(shape, bits_of(DTYPES[value.type.dtype])))

    def size(self, value: Any) -> Size:
        """A dim on intervals; dims grow with their sizes."""
        low = evaluate(value, {n: s.span.low for n, s in self.sizes.items()})
        return Size(low, evaluate(value, {n: s.span.high for n, s in self.sizes.items()}))

    def _most(self, name: str) -> int:
        """The largest size that all checks let through; the other sizes at their least."""
        limits = [self._largest(name, *check) for check in self.checks]
        return min([self.high, *limits])

    def _largest(self, name: str, value: Dim, limit: int) -> int:
        low, high = 0, self.high
        if name not in {s.name for s in _symbols(value)}:
            return high
        while low < high:
            middle = (low + high + 1) // 2
            found = evaluate(value, {n: middle if n == name else 1 for n in self.sizes})
            low, high = (middle, high) if found <= limit else (low, middle - 1)
        return low

    def execute(self, name: str, arguments: list[Any]) -> Any:
        """Run a function of the host."""
        module = _Unpacking().visit(ast.Module([copy.deepcopy(self.host[name])], []))
        space: dict[str, Any] = {
            "torch": Torch(), "F": Stub(), "moe": Library(), "launch": Launch(),
            "triton": _Triton(), "guards": _Guards(self), "min": smallest, "unpack": unpack,
        }  # fmt: skip
        for kernel in self.kernels.functions:
            space[kernel] = _Kernel(self, kernel)
        exec(compile(ast.unparse(module), f"<{name}>", "exec"), space)
        return space[name](arguments) if name == "backward" else space[name](*arguments)


def _symbols(d: Any) -> set[Any]:
    return set() if isinstance(d, int) else d.free_symbols


class _Unpacking(ast.NodeTransformer):
    """``a, b = f()`` as ``a, b = unpack(f(), 2)``: a stand-in does not know how many it is."""

    def visit_Assign(self, node: ast.Assign) -> ast.Assign:
        if isinstance(node.targets[0], ast.Tuple):
            count = ast.Constant(len(node.targets[0].elts))
            node.value = ast.Call(ast.Name("unpack", ast.Load()), [node.value, count], [])
        return node


def unpack(value: Any, count: int) -> Any:
    """So many stand-ins."""
    return [Stub() for _ in range(count)] if isinstance(value, Stub) else value


class _Triton:
    def cdiv(self, a: Any, b: int) -> Any:
        return -(-a // b)


@dataclass
class _Guards:
    host: Host

    def at_most(self, value: Any, limit: int, text: str, asked: str) -> None:
        self.host.checks.append((parse_dim(text), limit))


@dataclass
class _Kernel:
    """A kernel; a launch runs it on what it is given."""

    host: Host
    name: str

    def __getitem__(self, grid: tuple[Any, ...]) -> Callable[..., None]:
        return lambda *args, **named: self.launch(grid, args, named)

    def launch(self, grid: tuple[Any, ...], args: tuple[Any, ...], named: dict[str, Any]) -> None:
        parameters = [a.arg for a in self.host.kernels.functions[self.name].args.args]
        given = dict(zip(parameters, args, strict=False))
        for name in INTEGERS & given.keys():  # made by PyTorch: anything that 32 bits hold
            if not isinstance(given[name], Array):
                given[name] = Array(Tensor((), 32))
        args = tuple(given.values())
        note_contents(parameters, given)
        options = ("num_warps", "num_stages", "maxnreg")
        constants = {k: number(v) for k, v in named.items() if k not in options}
        spans = tuple(map(span, grid))
        self.host.launches.append((self.name, spans, [argument(a) for a in args], constants))
        self.host.given.append((self.name, given))


def argument(value: Any) -> Any:
    """A launch's argument as kernels see it: a number has 32 bits if they hold it."""
    if isinstance(value, Array):
        return Pointer(value.tensor)
    if isinstance(value, Size | int):
        return Int(32, span(value))
    return Other()


def note_contents(names: list[str], given: Mapping[str, Any]) -> None:
    """What the tensors hold that counting and placing pairs make and read."""
    if {"perm", "offsets", "inverse"} <= set(names) and "offsets" in given:
        rows, experts = span(given["perm"].shape[0]).high, span(given["offsets"].shape[0]).high - 1
        tokens, choices = map(span, given["inverse"].shape)
        given["perm"].tensor.contents = everywhere(0, tokens.high * choices.high - 1)
        given["inverse"].tensor.contents = everywhere(-1, rows - 1)
        given["offsets"].tensor.contents = everywhere(0, rows)
        given["offsets"].tensor.ascending = True
        if "picks" in given:
            given["picks"].tensor.contents = everywhere(0, tokens.high - 1)
        if "index" in given:
            given["index"].tensor.contents = everywhere(-1, experts)
        if "histogram" in given:
            histogram = given["histogram"].tensor
            histogram.contents, histogram.total = everywhere(0, rows), rows


def everywhere(low: int, high: int) -> Callable[[Span], Span]:
    """The same limits at every place."""
    return lambda place: Span(low, high)


__all__ = ["Host", "Size", "replace"]
