"""What each node of a captured training step holds in memory.

A node either makes new memory or shows memory that another node made, as a view. The schemas of
operations say which are views. Some that do not say so are, too: tracers note the result of each
node as a fake tensor, and fake tensors share storages as real ones do. A storage stands for one
memory only among a node and its sources: copies of a node, as a plan that repeats it has them, bear
the same notes and make memory each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import sympy
import torch
from torch import fx

Size: TypeAlias = int | sympy.Expr


@dataclass(frozen=True, eq=False)
class Memory:
    """Memory that one node made at its execution; ``size`` in bytes, an expression of the symbols
    of the input's sizes; ``maker`` is the first node that shows it.
    """

    maker: fx.Node
    size: Size

    def __repr__(self) -> str:
        return f"Memory({self.maker.name}: {self.size})"


def tensors_of(node: fx.Node) -> Sequence[torch.Tensor]:
    """The (fake) tensors that a node results in; none for a number."""
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [v for v in value if isinstance(v, torch.Tensor)]
    return []


def is_number(node: fx.Node) -> bool:
    """Whether a node computes sizes on the host."""
    return isinstance(
        node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool)
    )


def viewed(node: fx.Node) -> fx.Node | None:
    """The node of which an operation is a view by its schema."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.returns or schema.is_mutable:
        return None
    shared = schema.returns[0].alias_info
    if shared is None:
        return None
    names = [a.name for a in schema.arguments if a.alias_info is not None]
    first: Any = node.args[0] if node.args else node.kwargs.get(names[0])
    return first if isinstance(first, fx.Node) else None


def bytes_of(tensor: torch.Tensor) -> Size:
    """The size of the memory that a (fake) tensor shows a part of."""
    size: Any = tensor.untyped_storage().nbytes()
    return size.node.expr if isinstance(size, torch.SymInt) else int(size)


def size_at(size: Size, sizes: Mapping[sympy.Symbol, int]) -> int:
    """A size where the symbols have these values."""
    return size if isinstance(size, int) else int(size.xreplace(dict(sizes)))


def number_at(value: Any, sizes: Mapping[sympy.Symbol, int]) -> Any:
    """A number of a capture where the symbols have these values."""
    return size_at(value.node.expr, sizes) if isinstance(value, torch.SymInt) else value


def tensor_at(fake: torch.Tensor, sizes: Mapping[sympy.Symbol, int]) -> torch.Tensor:
    """A tensor of the layout of a captured one, of definite sizes, on the meta device."""
    shape = [number_at(size, sizes) for size in fake.shape]
    strides = [number_at(step, sizes) for step in fake.stride()]
    return torch.empty_strided(shape, strides, dtype=fake.dtype, device="meta")


class Memories:
    """The memory of every node of a graph; ``of(node)`` is what it shows, made by itself or not."""

    def __init__(self, graph: fx.Graph) -> None:
        self._of: dict[fx.Node, tuple[Memory, ...]] = {}
        self._given: dict[int, Memory] = {}  # inputs may show the same memory
        for node in graph.nodes:
            source, results = viewed(node), tensors_of(node)
            if source is not None:
                self._of[node] = self._of[source] * len(results)
            else:
                self._of[node] = self._shown(node, results)

    def of(self, node: fx.Node) -> tuple[Memory, ...]:
        """The memory that a node's results are in."""
        return self._of[node]

    def made_by(self, node: fx.Node) -> Iterator[Memory]:
        """What a node was the first to show."""
        return (m for m in dict.fromkeys(self._of[node]) if m.maker is node)

    def is_view(self, node: fx.Node) -> bool:
        """Whether a node shows only memory that others made."""
        found = self._of[node]
        return bool(found) and all(m.maker is not node for m in found)

    def _shown(self, node: fx.Node, results: Sequence[torch.Tensor]) -> tuple[Memory, ...]:
        known = dict(self._given) if node.op == "placeholder" else {}
        for source in node.all_input_nodes:
            known.update(zip(map(_storage, tensors_of(source)), self._of[source], strict=True))
        found = tuple(known.setdefault(_storage(t), Memory(node, bytes_of(t))) for t in results)
        if node.op == "placeholder":
            self._given.update(known)
        return found


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


__all__ = [
    "Memories",
    "Memory",
    "Size",
    "bytes_of",
    "is_number",
    "number_at",
    "size_at",
    "tensor_at",
    "tensors_of",
]
