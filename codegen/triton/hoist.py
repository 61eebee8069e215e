"""Ops of a body that must run before its kernel.

Where each token has one choice, tokens and rows are equally many, so work on tokens (a cast of the
routing weights, say) can land in a body of row work. A kernel reads such a value at the token of
another row, so it must be whole before the kernel starts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from moec.codegen.triton.kernel import needed_ops
from moec.ir.graph import Op, Value, producers

# what an op reads at places other than its own row
_TABLES: dict[str, tuple[int, ...]] = {
    "moe.permute": (0, 1),
    "moe.gather": (0, 1),
    "moe.expert_rows": (0, 1),
}
_TABLES |= {"moe.grouped_mm": (1, 2), "moe.grouped_outer": (2,), "moe.combine": (0, 2, 3)}


@dataclass(frozen=True)
class Hoisted:
    """An op without the ops that run before it; their results are further operands."""

    before: tuple[Op, ...]
    op: Op


def hoist(op: Op) -> Hoisted:
    """Take out of a ``kern.`` op's body what its kernel reads as tables but would compute.

    The Gluon kernels read numbers a row while they wait for nothing else, so they get them in the
    order of the rows.
    """
    body = op.body
    if body is None or op.kind == "kern.routing":
        return Hoisted((), op)
    made = producers(body)
    tables = [
        v
        for o in body.ops
        for i in _TABLES.get(o.kind, ())
        if i < len(o.operands) and (v := o.operands[i]) in made
    ]
    if op.attrs.get("template") == "gluon":
        tables += [o.result for o in body.ops if o.kind == "moe.permute"]
    if not tables:
        return Hoisted((), op)
    before = tuple(needed_ops(body, tables, set()))
    results = tuple(v for o in before for v in o.results)
    kept = [(v, r) for v, r in zip(body.outputs, op.results, strict=True) if v not in results]
    inner = replace(
        body,
        inputs=(*body.inputs, *results),
        ops=tuple(o for o in body.ops if o not in before),
        outputs=tuple(v for v, _ in kept),
    )
    operands: tuple[Value, ...] = (*op.operands, *results)
    return Hoisted(
        before, replace(op, operands=operands, results=tuple(r for _, r in kept), body=inner)
    )
