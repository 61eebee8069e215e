"""Blocks without a loop that depends on data: captured whole by ``torch.export``.

Such a block computes every expert for every token and mixes (stacked weights with ``bmm`` or
``einsum``, one-hot dispatch, soft mixtures, merged weights), or picks rows of weights by index
(product keys, gathered weights), or splits sorted rows by their number. All of it is straight-line
code once sizes are symbols. What the tracer took for granted of the sizes (its guards) must hold at
every size, else the block is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from moec.capture.arguments import Extra, axis_names
from moec.capture.block import (
    CapturedBlock,
    ExportImporter,
    block_name,
    export,
)
from moec.capture.counts import hidden_sizes
from moec.capture.open_sizes import open_sizes
from moec.capture.ragged import RaggedImporter
from moec.capture.requirements import SizeGuard, raised_at
from moec.capture.size_guards import BoundToSizeError, doubtful_sizes
from moec.capture.sizes import dim_of_expression
from moec.errors import CaptureError, NotRunError
from moec.ir import dims
from moec.ir.dims import Dim
from moec.ir.graph import Value
from moec.ir.types import Type, dtype_name
from moec.share import trial_copy

_EXAMPLE = {"B": 3, "S": 5, "T": 15}


def capture_dense(
    module: nn.Module,
    path: str,
    dtype: torch.dtype | None,
    rank: int,
    extras: Sequence[Extra] = (),
) -> CapturedBlock:
    """The IR of a block called with tokens and arguments of the forms ``extras``.

    Raises :class:`CaptureError` where a part of it has no IR form, or where one graph does not hold
    for every number of tokens.
    """
    data = example(module, dtype, rank, extras)
    called = _Sized(module) if any(e.kind == "sizes" for e in extras) else module
    reason: CaptureError | None = None
    for strict in (False, True):
        try:
            with open_sizes(module):
                free = _dynamic(data[0], rank, extras)
                exported, guards = export(called, data, free, module, strict=strict)
            importer = _DenseImporter(exported, guards, axis_names(rank), extras, path)
            return importer.run(called)
        except BoundToSizeError as error:
            reason = error  # the other tracer may keep the size open
        except CaptureError as error:
            raise (reason or error) from error
    raise reason if reason is not None else CaptureError("nothing was captured")


class _Sized(nn.Module):
    """A module that takes numbers of rows as a list, called with a tensor of them."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor, sizes: torch.Tensor) -> Any:
        return self.inner(x, sizes.tolist())


def example(
    module: nn.Module, dtype: torch.dtype | None, rank: int, extras: Sequence[Extra]
) -> tuple[torch.Tensor, ...]:
    """Arguments on which a module runs; :class:`NotRunError` if it does on none of the likely
    ones.
    """
    parameter = next(p for p in module.parameters() if p.is_floating_point())
    generator = torch.Generator().manual_seed(0)
    leading = [_EXAMPLE[n] for n in axis_names(rank)]
    tried = trial_copy(module) if extras else module
    device = next(tried.parameters()).device
    errors = []
    for hidden in hidden_sizes(module):
        x = torch.randn(*leading, hidden, generator=generator).to(dtype or parameter.dtype)
        data = [x, *(e.example(_EXAMPLE, generator) for e in extras)]
        error = _error_on(tried, [t.to(device) for t in data], extras)
        if error is None:
            return tuple(t.to(parameter.device) for t in data)
        errors.append(error)
    raise NotRunError(
        f"{type(module).__name__} did not run on tokens of rank {rank}"
        + (f" and {len(extras)} more arguments" if extras else " alone")
        + "".join(f" ({error})" for error in errors[:1])
    )


def _error_on(
    module: nn.Module, data: Sequence[torch.Tensor], extras: Sequence[Extra]
) -> str | None:
    """What a module raises on these arguments, and where; ``None`` if it runs."""
    called = _Sized(module) if any(e.kind == "sizes" for e in extras) else module
    try:
        with torch.no_grad():
            called(*data)
    except Exception as error:  # what a user's code raises on wrong sizes is up to that code
        return raised_at(error)
    return None


def _dynamic(x: torch.Tensor, rank: int, extras: Sequence[Extra]) -> tuple[dict[int, Any], ...]:
    free = torch.export.Dim.DYNAMIC
    tokens = {axis: free for axis in range(x.dim() - 1)}
    others = ({n: free for n, a in enumerate(e.axes) if isinstance(a, str)} for e in extras)
    return (tokens, *others)


class _DenseImporter(ExportImporter):
    """Imports an exported block; its inputs become the tokens, the other arguments, the weights."""

    def __init__(
        self,
        exported: Any,
        guards: Sequence[SizeGuard],
        names: Sequence[str],
        extras: Sequence[Extra],
        path: str,
    ) -> None:
        super().__init__(exported, names, path)
        self.extras, self.guards = list(extras), guards
        self.importer: RaggedImporter | None = None

    def run(self, block: nn.Module) -> CapturedBlock:
        """The captured block."""
        graph: fx.Graph = self.exported.graph
        importer = RaggedImporter(self.builder, self.shape, self.size, module_path=self.path)
        self.importer = importer
        self.bind_inputs(importer, graph)
        self.check_ranges()
        doubtful = doubtful_sizes(self.guards, self.symbols, self.names)
        importer.run(graph)
        output = next(n for n in graph.nodes if n.op == "output")
        if not all(isinstance(n, fx.Node) for n in output.args[0]):
            raise CaptureError("the block returns something that is no tensor")
        results = [importer.value(importer.env[n]) for n in output.args[0]]
        name = block_name(self.path, getattr(block, "inner", block))
        made = self.builder.graph(name, [*self.data, *self.weights.values()], results)
        paths = tuple(p.removeprefix("inner.") for p in self.weights)
        paths = paths if isinstance(block, _Sized) else tuple(self.weights)
        tree = self.exported.call_spec.out_spec
        return CapturedBlock(made, paths, tree, doubtful=doubtful)

    def argument(self, node: fx.Node) -> Value:
        """The tokens first, then the other arguments in order."""
        value = self.other(node) if self.data else self.tensor(node, len(self.names), node.name)
        self.data.append(value)
        return value

    def other(self, node: fx.Node) -> Value:
        """An argument after the tokens: its axes are those of the tokens."""
        extra, value = self.extras[len(self.data) - 1], node.meta["val"]
        for name, size in zip(extra.axes, value.shape, strict=False):
            if isinstance(name, str) and not isinstance(size, int):
                self.symbols.setdefault(size.node.expr, dims.dim(name))
        shape = tuple(map(self.size, value.shape))
        wanted = tuple(dims.dim(a) if isinstance(a, str) else a for a in extra.axes)
        if extra.kind == "index" and shape != wanted:
            raise CaptureError(f"an argument of shape {shape} is not of the form {wanted}")
        return Value(Type(dtype_name(value.dtype), shape), node.name)

    def dim(self, expression: Any) -> Dim:
        """A tracer's expression as a dim over the names of the token axes, quotients included."""
        ragged = self.importer.counts if self.importer is not None else {}
        return dim_of_expression(expression, {**self.symbols, **ragged})


__all__ = ["capture_dense", "example"]
