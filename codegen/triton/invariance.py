"""Whether a token's bits can depend on the other tokens: what ``numerics="repro"`` refuses.

Kernels of moec add in an order that does not depend on the number of rows. PyTorch's elementwise
work and what only moves numbers is safe, too; its sums and products choose an order by size. Such
an op may stay only if no value of tokens follows from it: gradients of weights are sums over the
batch.
"""

from __future__ import annotations

from collections.abc import Iterable

from moec.errors import InvarianceError
from moec.ir.graph import Graph, Op, Value, walk
from moec.ir.opdef import opdef

REPRO = "repro"  # the attribute ``numerics`` of a kernel whose rows must not depend on each other
_MOVES = frozenset(
    "t.full t.reshape t.permute t.expand t.slice t.unslice t.split t.merge t.concat t.stack t.cast "
    "t.arange t.size t.one_hot t.gather t.take moe.one_group moe.dispatch moe.gather moe.permute "
    "moe.unpermute moe.expert_rows moe.row_scale".split()
)
# what is exact, or has one order, along an axis of known size
_ALONG = frozenset(("t.amax", "t.sort", "t.scatter"))
_WARP = 1024  # up to so many numbers, PyTorch's softmax has one order
_ACROSS = {
    "moe.limit": "which tokens an expert still takes depends on the others",
    "moe.round_tokens": "rounding moves tokens by how many chose an expert",
    "moe.dispatch_picks": "experts choose among the tokens of the batch",
}


def is_invariant(graph: Graph) -> bool:
    """Whether a graph was lowered with the promise that rows do not depend on each other."""
    return any(op.attrs.get("numerics") == REPRO for op in graph.ops)


def check_ops(graph: Graph) -> None:
    """Refuse what makes a token's result depend on the others by its meaning.

    Raises:
        InvarianceError: it names the op and the reason.
    """
    for op in walk(graph):
        if op.kind in _ACROSS:
            raise refusal(op, _ACROSS[op.kind])


def check_library_op(graph: Graph, op: Op) -> None:
    """Refuse an op of ``graph`` that PyTorch runs in an order which depends on the batch.

    Raises:
        InvarianceError: it names the op and the reason.
    """
    if not keeps_order(op) and any(map(_is_of_tokens, _following(graph, op.results))):
        why = "PyTorch adds in an order that depends on the number of tokens"
        raise refusal(op, why)


def refusal(op: Op, why: str) -> InvarianceError:
    """The error for an op that cannot be what was asked for."""
    place = f"{op.loc}: " if op.loc is not None else ""
    return InvarianceError(
        f'{place}{op.kind}: numerics "repro" cannot be promised for the target triton: {why}. '
        'Compile this model with numerics "default".'
    )


def keeps_order(op: Op) -> bool:
    """Whether PyTorch computes each row of an op as it does when the row is alone."""
    if op.kind in _MOVES or opdef(op.kind).pointwise:
        return True
    if op.kind in ("t.softmax", "moe.activate"):
        size = op.operands[0].type.shape[op.attrs.get("dim", -1)]
        return isinstance(size, int) and size <= _WARP
    if not _is_along_known(op):
        return False
    exact = op.kind in ("t.sum", "t.cumsum") and not op.operands[0].type.is_float
    return exact or op.kind in _ALONG


def _is_along_known(op: Op) -> bool:
    """Whether an op works along axes of known sizes."""
    axes = op.attrs.get("dims", (op.attrs["dim"],) if "dim" in op.attrs else ())
    shape = op.operands[0].type.shape if op.operands else ()
    return bool(axes) and all(isinstance(shape[a], int) for a in axes)


def _following(graph: Graph, values: Iterable[Value]) -> set[Value]:
    """Values, and all that depend on them."""
    found = set(values)
    for op in graph.ops:
        if any(v in found for v in op.operands):
            found.update(op.results)
    return found


def _is_of_tokens(value: Value) -> bool:
    return any(not isinstance(d, int) for d in value.type.shape)


__all__ = ["REPRO", "check_library_op", "check_ops", "is_invariant", "keeps_order", "refusal"]
