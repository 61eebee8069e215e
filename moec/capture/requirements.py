"""What a block asks of the sizes of its tokens, and which line of the model asks for it."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from moec.capture.importer import location_of
from moec.ir.dims import Dim

_TORCH = os.path.dirname(torch.__file__) + os.sep
_OWN = os.path.dirname(os.path.dirname(__file__)) + os.sep


@dataclass(frozen=True)
class SizeGuard:
    """A condition on sizes that a tracer relied on; ``place`` is the line that asked, if known."""

    condition: Any
    place: str = ""

    def text(self, names: Mapping[Any, Dim]) -> str:
        """``block.py:31: the block works only where S <= 64``, over the names of token axes."""
        lead = f"{self.place}: " if self.place else ""
        return f"{lead}the block works only where {self.condition.xreplace(names)}"


def size_guards(exported: Any) -> tuple[SizeGuard, ...]:
    """The conditions that hold for the example of an exported program and were relied on."""
    nodes = list(exported.graph.nodes)
    for node in nodes:
        mode = getattr(node.meta.get("val"), "fake_mode", None)
        if mode is not None and mode.shape_env is not None:
            return guards_of(mode.shape_env, nodes)
    return ()


def guards_of(environment: Any, nodes: Sequence[fx.Node] = ()) -> tuple[SizeGuard, ...]:
    """The conditions that a tracer's environment of sizes relied on."""
    return tuple(SizeGuard(g.expr, _asked_at(g, nodes)) for g in environment.guards)


def _asked_at(guard: Any, nodes: Iterable[fx.Node]) -> str:
    """Where a guard comes from: a line of the model that compares sizes, or that calls an op which
    does.
    """
    frame = getattr(guard.sloc, "framework_loc", None)
    if isinstance(frame, traceback.FrameSummary) and not frame.filename.startswith(_TORCH):
        return f"{os.path.basename(frame.filename)}:{frame.lineno}"
    numbers = {int(n) for n in guard.expr.atoms() if n.is_Integer}
    for node in nodes:
        symbols, sizes = _sizes_read(node)
        if guard.expr.free_symbols & symbols and numbers & sizes:
            return str(location_of(node, "") or "")
    return ""


def _sizes_read(node: fx.Node) -> tuple[set[Any], set[int]]:
    """The symbols and the fixed sizes of what an op reads."""
    values: list[Any] = [a.meta.get("val") for a in node.all_input_nodes]
    values += [size for v in values if isinstance(v, torch.Tensor) for size in v.shape]
    symbolic = [v for v in values if isinstance(v, torch.SymInt)]
    symbols = {symbol for s in symbolic for symbol in s.node.expr.free_symbols}
    return symbols, {v for v in values if isinstance(v, int)}


def raised_at(error: BaseException) -> str:
    """``block.py:31: what the error says``: the innermost line that is neither torch's nor moec's;
    the first line of what it says alone where there is none.
    """
    said = str(error).strip().splitlines() or [type(error).__name__]
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not f.filename.startswith((_TORCH, _OWN))]
    return f"{os.path.basename(own[-1].filename)}:{own[-1].lineno}: {said[0]}" if own else said[0]


__all__ = ["SizeGuard", "guards_of", "raised_at", "size_guards"]
