"""Choose a template and a tile for each kernel."""

from __future__ import annotations

from dataclasses import replace

from moec.codegen.triton.choose import Limits, attributes
from moec.errors import PassError
from moec.ir.builder import make_op
from moec.ir.graph import Graph, Op
from moec.manager import register
from moec.tuning.file import load_tuning


@register("lower")
def lower(
    graph: Graph,
    *,
    descriptors: bool = False,
    gluon: bool = False,
    few: bool = False,
    repro: bool = False,
    block_m: int = 0,
    block_n: int = 0,
    block_k: int = 0,
    block: int = 0,
    tuning: str = "",
) -> Graph:
    """Set ``template`` and ``tile`` of every product's kernel.

    ``descriptors`` allows the Hopper template ("tma": the copy engine moves tiles), which a kernel
    gets where its sizes and dtypes fit; the others get "pointer". ``gluon`` allows the template for
    Hopper alone in which some warps load and others multiply; it goes before both. ``few`` is for
    calls of few tokens: the whole routing is one program, which also lists the row tiles, and
    products have tiles of few rows, whose programs read the weights of one expert each. ``repro``
    says that a token's bits must not depend on the other tokens: what is emitted then is refused
    where it could. The block sizes override the rules' choice of rows, columns and depth of
    products, and of the vectors of the other kernels. ``tuning`` is a file of measured tiles: what
    it says of a kernel that can have the tile goes before the rules, but not before ``few``,
    ``repro`` and block sizes.

    Raises:
        PassError: ``repro`` with ``few``, whose tiles are others than those for many tokens.
    """
    if few and repro:
        raise PassError("lower: few and repro exclude each other: tiles for few tokens add apart")
    limits = Limits(descriptors, gluon, few, block_m, block_n, block_k, block, repro)
    if tuning and not (few or repro):
        limits = replace(limits, tuning=load_tuning(tuning))
    ops = tuple(_lowered(op, limits) if op.kind.startswith("kern.") else op for op in graph.ops)
    return (
        graph if all(a is b for a, b in zip(ops, graph.ops, strict=True)) else graph.with_ops(ops)
    )


def _lowered(op: Op, limits: Limits) -> Op:
    attrs = {**op.attrs, **attributes(op, limits)}
    if attrs == dict(op.attrs):
        return op
    checked = make_op(op.kind, op.operands, attrs, body=op.body, loc=op.loc)
    return replace(op, attrs=checked.attrs)
