"""Sizes that stay symbols while a block with a loop runs for real.

Tensors tell how many tokens they have as symbols, so that what the block computes from them (a
capacity, say) keeps its expression; operations on tensors get plain numbers. Comparisons that the
block's Python code makes between sizes become guards, as in an export.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from moec.capture.branches import Place
from moec.capture.requirements import SizeGuard, guards_of
from moec.capture.sizes import dim_of_expression
from moec.errors import CaptureError
from moec.ir.dims import Dim, dim

_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)
_TELLING = (
    torch.Tensor.shape.__get__,  # type: ignore[attr-defined]
    torch.Tensor.size,
    torch.Tensor.numel,
    torch.Tensor.nelement,
)


class SizeTrace(TorchFunctionMode):
    """A mode in which tensors tell sizes as symbols: the axes' names to their sizes in this run.

    ``computed`` has the expressions that operations were given, by their number; ``places`` where
    they were.
    """

    def __init__(self, sizes: Mapping[str, int]) -> None:
        super().__init__()
        self.environment = ShapeEnv(specialize_zero_one=False)
        self.axes = {name: self._symbol(name, size) for name, size in sizes.items()}
        self.names = {s.node.expr: dim(name) for name, s in self.axes.items()}
        self.known = dict(_products(self.axes, sizes))
        self.computed: dict[int, set[Any]] = {}
        self.places: set[Place] = set()

    def _symbol(self, name: str, size: int) -> torch.SymInt:
        source = ConstantSource(name)
        made = self.environment.create_symbol(
            size, source=source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None
        )
        symbol: Any = self.environment.create_symintnode(made, hint=size, source=source)
        return symbol  # type: ignore[no-any-return]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "").startswith("sym_"):  # arithmetic of symbols
            return func(*args, **(kwargs or {}))
        plain, named = self._plain(args), self._plain(kwargs or {})
        result = func(*plain, **named)
        return self._told(result) if func in _TELLING else result

    def _told(self, result: Any) -> Any:
        if isinstance(result, torch.Size):
            return torch.Size(tuple(self.known.get(size, size) for size in result))
        return self.known.get(result, result)

    def _plain(self, arguments: Any) -> Any:
        """Arguments with numbers in place of symbols."""
        return tree_map(self._number, arguments)

    def _number(self, argument: Any) -> Any:
        if isinstance(argument, slice):
            return slice(*map(self._number, (argument.start, argument.stop, argument.step)))
        if isinstance(argument, torch.Size):
            return torch.Size(tuple(map(self._number, argument)))
        if not isinstance(argument, _SYMBOLS):
            return argument
        self.places.add(_place())
        number = argument.node.hint
        if isinstance(argument, torch.SymInt):
            self.computed.setdefault(number, set()).add(argument.node.expr.xreplace(self.names))
        return number

    @property
    def guards(self) -> list[SizeGuard]:
        """What the run took for granted of the sizes, over the axes' names."""
        found = guards_of(self.environment)
        return [SizeGuard(g.condition.xreplace(self.names), g.place) for g in found]


def _products(axes: Mapping[str, Any], sizes: Mapping[str, int]) -> Iterator[tuple[int, Any]]:
    """Every product of axes by its number."""
    for count in range(1, len(axes) + 1):
        for names in itertools.combinations(axes, count):
            yield math.prod(sizes[n] for n in names), math.prod(axes[n] for n in names)


def computed_dims(
    first: SizeTrace, second: SizeTrace
) -> tuple[dict[tuple[int, int], list[Dim]], list[str]]:
    """The dims that two runs computed from their sizes, by the pair of their numbers; and why other
    expressions are no dims.
    """
    symbols = {dim(name): dim(name) for name in first.axes}
    found: dict[tuple[int, int], list[Dim]] = {}
    reasons: list[str] = []
    for one, other in itertools.product(first.computed, second.computed):
        for expression in first.computed[one] & second.computed[other]:
            try:
                made = dim_of_expression(expression, symbols)
            except CaptureError as error:
                reasons.append(str(error))
                continue
            dims = found.setdefault((one, other), [])
            if made not in dims:
                dims.append(made)
    return found, reasons


def _place() -> Place:
    """The innermost frame outside torch and moec."""
    frame = inspect.currentframe()
    while frame is not None:
        path = frame.f_code.co_filename
        if "/torch/" not in path and "/moec/" not in path and not path.startswith("<"):
            return path, frame.f_lineno
        frame = frame.f_back
    return "", 0


__all__ = ["SizeTrace", "computed_dims"]
