"""Which of a router's scores the backward pass computes again: all experts' scores of all tokens
are more than what else is kept of the routing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from moec.ir.dims import Dim, canon, evaluate, product, symbols
from moec.ir.graph import Graph, Op, Value, producers
from moec.ir.opdef import opdef

_SHARE = 0.02  # of the experts' products: so much work may be done again for a router
_RESHAPED = ("t.reshape", "t.permute")


def redone_scores(graph: Graph, backward: Collection[Op]) -> set[Op]:
    """The ops between logits and weights that the backward pass does again.

    Scores are, where logits take fewer bytes or are done again. Logits are, if they are a product
    of inputs that the backward pass reads anyway, with at most 2% of the work of the experts'
    products in both passes.
    """
    made = producers(graph)
    ahead = [op for op in graph.ops if op not in backward]
    read = {v for op in graph.ops if op in backward for v in op.operands}
    kept = {v for v in graph.inputs if any(v in _leaves(made, r) for r in read)}
    experts = sum(3 * _work(op) for op in ahead if op.kind == "moe.grouped_mm")
    found = set[Op]()
    for op in ahead:
        if op.kind == "moe.weight":
            found |= _redone(made, op.operands[0], kept, _SHARE * experts)
    return found


def _redone(made: dict[Value, Op], scores: Value, kept: Collection[Value], most: float) -> set[Op]:
    """What is done again of the scores that weights are taken from."""
    op, activation, bytes_kept = made.get(scores), set[Op](), scores.type.bytes
    if op is not None and op.kind == "moe.activate":
        activation, scores = {op}, op.operands[0]
    source = scores
    while source in made and opdef(made[source].kind).pointwise and len(made[source].operands) == 1:
        source = made[source].operands[0]
    product_op = made.get(source)
    if product_op is not None and product_op.kind == "t.linear" and _work(product_op) <= most:
        leaves = {leaf for v in product_op.operands for leaf in _leaves(made, v)}
        if leaves <= set(kept):
            return {*activation, product_op}
    return activation if _at_one(source.type.bytes) < _at_one(bytes_kept) else set()


def _leaves(made: dict[Value, Op], value: Value) -> Iterator[Value]:
    """What a value is made of by work on single numbers and reshapes."""
    op = made.get(value)
    if op is None or not (opdef(op.kind).pointwise or op.kind in _RESHAPED):
        yield value
        return
    for operand in op.operands:
        yield from _leaves(made, operand)


def _work(op: Op) -> int:
    """Multiplications of a product, a token's share of them."""
    return _at_one(canon(product((*op.result.type.shape, op.operands[0].type.shape[-1]))))


def _at_one(size: Dim) -> int:
    """A size for one token."""
    return evaluate(size, dict.fromkeys(symbols(size), 1))
