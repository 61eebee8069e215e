"""Recording what a Python function does to tensors: a dispatch mode that writes an FX graph.

Only ops that depend on the marked tensors are written; everything else (indices, masks, loop
bounds) is computed for real and becomes a constant. Two recordings at different sizes are then
merged: an integer that is the same in both is a constant, one that scales with the sizes is a dim.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from moec.errors import CaptureError
from moec.ir.dims import Dim, canon, dim

aten = torch.ops.aten
_SHAPE_ONLY = {
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.empty_like.default,
    aten.full_like.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_empty.default,
    aten.new_full.default,
}
_CREATIONS = frozenset({aten.arange.default, aten.arange.start})
_ADDED_AT = {"index_add": 3, "index_put": 2, "index_copy": 3, "scatter_add": 3}
_OUT_OF_PLACE = {
    "add_": "add",
    "sub_": "sub",
    "mul_": "mul",
    "div_": "div",
    "clamp_": "clamp",
    "clamp_max_": "clamp_max",
    "clamp_min_": "clamp_min",
    "sigmoid_": "sigmoid",
    "relu_": "relu",
    "silu_": "silu",
    "index_add_": "index_add",
    "index_put_": "index_put",
    "fill_": "fill",
    "masked_fill_": "masked_fill",
    "scatter_": "scatter",
    "scatter_add_": "scatter_add",
    "scatter_reduce_": "scatter_reduce",
    "copy_": "copy",
}


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes every op that depends on a marked tensor as a node of ``graph``.

    With ``creations``, numbers from 0 up (``arange``) are written too: places may route tokens.
    With ``skip_empty``, adding no rows is not: experts without tokens play no part.
    """

    def __init__(self, creations: bool = False, skip_empty: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = fx.Graph()
        self.nodes: dict[int, fx.Node] = {}
        self.alive: list[torch.Tensor] = []
        self.reads: list[fx.Node] = []
        self.stale: set[int] = set()
        self.creations = _CREATIONS if creations else frozenset()
        self.skip_empty = skip_empty

    def mark(self, name: str, tensor: torch.Tensor) -> fx.Node:
        """Make ``tensor`` an input of the recording."""
        node = self.graph.placeholder(name)
        self._bind(tensor, node)
        return node

    def _bind(self, tensor: torch.Tensor, node: fx.Node) -> None:
        node.meta.setdefault("val", tensor)
        self.nodes[id(tensor)] = node
        self.alive.append(tensor)

    def opaque(self, target: Any, args: tuple[Any, ...], out: torch.Tensor) -> torch.Tensor:
        """Write one call that the recorder did not see inside of."""
        recorded = self._arguments(args)
        node = self.graph.call_function(target, recorded)
        note_place(node)
        self._bind(out, node)
        return out

    def node_of(self, tensor: torch.Tensor) -> fx.Node | None:
        """The node that made a tensor, ``None`` for a constant."""
        return self.nodes.get(id(tensor))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [a for a in tree_flatten((args, kwargs))[0] if isinstance(a, torch.Tensor)]
        for tensor in tensors:
            self.alive.append(tensor)  # ids stay unique while the recording lasts
        if func is aten.set_.source_Tensor and args[0] is args[1]:
            return args[0]  # torch's parametrizations give a parameter its own storage again
        known = func in self.creations or any(id(t) in self.nodes for t in tensors)
        if func in _SHAPE_ONLY or not known:
            return func(*args, **kwargs)
        if any(id(t) in self.stale for t in tensors):
            raise CaptureError(f"{func} reads a view of a tensor that was changed through another")
        recorded = self._arguments(args), self._arguments(kwargs)  # before the op may change them
        out = func(*args, **kwargs)
        if self.skip_empty and _adds_nothing(func, args):
            return self._as_before(args[0], out)
        self._record(func, args, recorded, out)
        return out

    def _as_before(self, target: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Bind a result that equals an operand to that operand's node, if it has one."""
        node = self.nodes.get(id(target))
        if node is not None and out is not target:
            self._bind(out, node)
        return out

    def watching(self) -> TorchFunctionMode:
        """A mode, to be entered with the recorder, that sees what never reaches the dispatcher."""
        return _Reads(self)

    def _arguments(self, args: Any) -> Any:
        return tree_map_only(
            torch.Tensor, lambda t: self.nodes.get(id(t)) or Constant(t.clone()), args
        )

    def _record(self, func: Any, args: Any, recorded: tuple[Any, Any], out: Any) -> None:
        mutates = func._schema.is_mutable
        target = self._functional(func, args) if mutates else func
        node = self.graph.create_node("call_function", target, *recorded)
        node.meta["val"] = out
        note_place(node)
        if isinstance(out, tuple | list):
            self._bind_many(out, node)
        elif isinstance(out, torch.Tensor):
            self._bind(args[0] if mutates else out, node)
            if mutates:
                self._write_through(args[0], node)
        elif out is not None:
            self.reads.append(node)

    def _bind_many(self, outs: Sequence[Any], node: fx.Node) -> None:
        for index, item in enumerate(outs):
            if isinstance(item, torch.Tensor):
                part = self.graph.call_function(operator.getitem, (node, index))
                self._bind(item, part)

    def _functional(self, func: Any, args: Sequence[Any]) -> Any:
        """The op without mutation."""
        name = func._schema.name.split("::")[1]
        if name not in _OUT_OF_PLACE:
            raise CaptureError(f"{func} changes a tensor in place")
        packet = getattr(aten, _OUT_OF_PLACE[name])
        return getattr(packet, func._overloadname)

    def _write_through(self, target: torch.Tensor, node: fx.Node) -> None:
        """After a change of a view: what it is a view of has changed too, other views are not read
        again.
        """
        storage = target.untyped_storage()
        others = {
            id(t): t
            for t in self.alive
            if t is not target
            and storage.data_ptr() != 0
            and t.untyped_storage().data_ptr() == storage.data_ptr()
            and _still_used(t, target)
        }
        for key, other in others.items():
            if not _is_whole(other):
                self.stale |= {key} & self.nodes.keys()
                continue
            geometry = (list(target.shape), list(target.stride()), target.storage_offset())
            base = self._arguments(other)
            written = self.graph.call_function(
                aten.as_strided_scatter.default, (base, node, *geometry)
            )
            note_place(written)
            written.meta["val"] = other
            self._bind(other, written)


def _is_whole(tensor: torch.Tensor) -> bool:
    """Whether a tensor has all of its memory, in order."""
    size = tensor.numel() * tensor.element_size()
    return tensor.is_contiguous() and size == tensor.untyped_storage().nbytes()


def _adds_nothing(func: Any, args: Sequence[Any]) -> bool:
    """Whether an op adds or puts no rows into its first operand."""
    name = func._schema.name.split("::")[1]
    source = _ADDED_AT.get(name.rstrip("_"))
    return source is not None and len(args) > source and _is_empty(args[source])


def _is_empty(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.numel() == 0


class _Reads(TorchFunctionMode):
    """Notes when recorded values become Python lists or arrays."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READS and id(args[0]) in self.recorder.nodes:
            self.recorder.reads.append(self.recorder.nodes[id(args[0])])
        return func(*args, **(kwargs or {}))


_READS = (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__)


def _still_used(tensor: torch.Tensor, target: torch.Tensor) -> bool:
    return (
        tensor.shape != target.shape
        or tensor.stride() != target.stride()
        or tensor.storage_offset() != target.storage_offset()
    )


@dataclass(frozen=True, eq=False)
class Constant:
    """A tensor that does not depend on the marked ones."""

    tensor: torch.Tensor

    def __repr__(self) -> str:
        return f"constant{tuple(self.tensor.shape)}"


def note_place(node: fx.Node) -> None:
    """Note on a node the innermost frame outside torch and moec."""
    frame = inspect.currentframe()
    while frame is not None:
        path = frame.f_code.co_filename
        if "/torch/" not in path and "/moec/" not in path and not path.startswith("<"):
            node.meta["place"] = path, frame.f_lineno
            node.meta["location"] = path.rsplit("/", 1)[-1], frame.f_lineno
            return
        frame = frame.f_back


@dataclass(frozen=True)
class Sizes:
    """The sizes of the symbols in the two recordings: name to a pair.

    ``computed`` are dims that the recorded code made of them, by the pair of their numbers;
    ``doubts`` say why other numbers that it computed are no dims.
    """

    pairs: Mapping[str, tuple[int, int]]
    computed: Mapping[tuple[int, int], Sequence[Dim]] = field(default_factory=dict)
    doubts: Sequence[str] = ()

    def dim(self, first: int, second: int) -> Dim:
        """The dim that has these two values: a constant, a multiple of a product of up to two
        symbols, or one that was computed.
        """
        if first == second:
            return first
        found = [m for m in self._monomials(first, second) if m is not None]
        found += [d for d in self.computed.get((first, second), ()) if d not in found]
        if len(found) != 1:
            reason = "; ".join(dict.fromkeys(self.doubts))
            raise CaptureError(
                f"a size was {first} and {second} in two recordings: no multiple of "
                f"{', '.join(self.pairs)}" + (f"; {reason}" if reason else "")
            )
        return found[0]

    def _monomials(self, first: int, second: int) -> list[Dim | None]:
        names = list(self.pairs)
        groups = [(n,) for n in names] + [(a, b) for j, a in enumerate(names) for b in names[j:]]
        return [self._multiple(group, first, second) for group in groups]

    def _multiple(self, group: tuple[str, ...], first: int, second: int) -> Dim | None:
        one = math.prod(self.pairs[n][0] for n in group)
        two = math.prod(self.pairs[n][1] for n in group)
        if first % one or first // one * two != second or first == 0:
            return None
        return canon(math.prod((dim(n) for n in group), start=dim(group[0]) * 0 + first // one))


def merge(
    first: Recorder,
    second: Recorder,
    outputs: tuple[Any, Any],
    sizes: Sizes,
    same_name: Callable[[str, int], str],
) -> fx.Graph:
    """One FX graph from two recordings, with dims for sizes that differ.

    ``outputs`` are the result tensors; ``same_name(name, which)`` gives inputs that correspond the
    same name. Each node has its type in ``meta["shape"]`` and ``meta["val"]`` (of the first
    recording).
    """
    return _Merge(first, second, sizes, same_name).run(outputs)


class _Merge:
    def __init__(
        self, first: Recorder, second: Recorder, sizes: Sizes, same_name: Callable[[str, int], str]
    ) -> None:
        self.first, self.second, self.sizes, self.same_name = first, second, sizes, same_name
        self.graph = fx.Graph()
        self.done: dict[fx.Node, fx.Node] = {}

    def run(self, outputs: tuple[Any, Any]) -> fx.Graph:
        results = tree_flatten(
            self.both(
                *(
                    self.results(r, o)
                    for r, o in zip((self.first, self.second), outputs, strict=True)
                )
            )
        )[0]
        self.graph.output(tuple(results))
        return self.graph

    def results(self, recorder: Recorder, outputs: Any) -> list[Any]:
        found = []
        for value in tree_flatten(outputs)[0]:
            node = recorder.node_of(value) if isinstance(value, torch.Tensor) else None
            if node is None:
                raise CaptureError("a result does not depend on the input")
            found.append(node)
        return found

    def node(self, a: fx.Node, b: fx.Node) -> fx.Node:
        """The merged node of a corresponding pair, made with all that it needs."""
        if a not in self.done:
            self.done[a] = self.placeholder(a, b) if a.op == "placeholder" else self.make(a, b)
        return self.done[a]

    def placeholder(self, a: fx.Node, b: fx.Node) -> fx.Node:
        if b.op != "placeholder" or self.same_name(str(a.target), 0) != self.same_name(
            str(b.target), 1
        ):
            raise CaptureError(
                f"{a.target} in one recording is {b.target} in another: the experts differ"
            )
        node = self.graph.placeholder(_identifier(str(a.target)))
        node.meta.update(a.meta, source=str(a.target))
        return node

    def make(self, a: fx.Node, b: fx.Node) -> fx.Node:
        if a.target is not b.target:
            raise CaptureError(
                f"{a.target} in one recording is {b.target} in another: the code depends on "
                "sizes or on the expert"
            )
        args, kwargs = self.both(a.args, b.args), self.both(a.kwargs, b.kwargs)
        node = self.graph.create_node("call_function", a.target, args, kwargs)
        node.meta.update(a.meta)
        node.meta["shape"] = self.shape(a.meta["val"], b.meta["val"]) if "val" in a.meta else None
        return node

    def shape(self, a: Any, b: Any) -> Any:
        if isinstance(a, torch.Tensor):
            return tuple(
                self.sizes.dim(int(m), int(n)) for m, n in zip(a.shape, b.shape, strict=True)
            )
        return None

    def both(self, a: Any, b: Any) -> Any:
        """Merge two arguments."""
        if type(a) is not type(b):
            raise CaptureError(f"argument {a!r} in one recording is {b!r} in another")
        if isinstance(a, fx.Node):
            return self.node(a, b)
        if isinstance(a, Constant):
            return ConstantPair(a.tensor, b.tensor)
        if isinstance(a, list | tuple):
            if len(a) != len(b):
                raise CaptureError(f"{len(a)} arguments in one recording are {len(b)} in another")
            return type(a)(self.both(m, n) for m, n in zip(a, b, strict=True))
        if isinstance(a, Mapping):
            return {k: self.both(a[k], b[k]) for k in a}
        return self.plain(a, b)

    def plain(self, a: Any, b: Any) -> Any:
        if isinstance(a, int) and not isinstance(a, bool) and a != b:
            return IntegerPair(a, b)
        if a != b and not (a != a and b != b):
            raise CaptureError(f"argument {a!r} in one recording is {b!r} in another")
        return a


@dataclass(frozen=True, eq=False)
class ConstantPair:
    """A constant tensor of the two recordings."""

    first: torch.Tensor
    second: torch.Tensor


@dataclass(frozen=True)
class IntegerPair:
    """An integer that differs between the recordings: a size or the number of the expert."""

    first: int
    second: int


def _identifier(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)
