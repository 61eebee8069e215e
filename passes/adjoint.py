"""Move inner products and row scales through grouped products, so that expert outputs need not be
kept.
"""

from __future__ import annotations

from typing import Any

from moec.ir.builder import Builder
from moec.ir.graph import Graph, Op
from moec.manager import register
from moec.reasons import chose, decline
from moec.rewrite import Definitions, fixpoint, transform


def dot_through_product(b: Builder, op: Op, made: Op) -> Any:
    """``<a W, g> = <a, g W'>`` row by row: the product's result is no longer needed."""
    x, w, offsets = made.operands
    back = b(
        "moe.grouped_mm",
        op.operands[1],
        w,
        offsets,
        transposed=not made.attrs.get("transposed", False),
    )
    return b("moe.row_dot", x, back, dtype=op.attrs["dtype"], hint=op.result.hint)


def dot_of_sum(b: Builder, op: Op, made: Op) -> Any:
    """``<p + q, g> = <p, g> + <q, g>``."""
    if len(made.operands) != 2 or made.operands[0].type != made.operands[1].type:
        return None
    parts = [
        b("moe.row_dot", part, op.operands[1], dtype=op.attrs["dtype"]) for part in made.operands
    ]
    return b("t.add", *parts, hint=op.result.hint)


def scale_after_product(b: Builder, op: Op, made: Op) -> Any:
    """``(c g) W = c (g W)``: the scale becomes work after the product."""
    rows, scale = made.operands
    product = b(
        "moe.grouped_mm", rows, *op.operands[1:], transposed=op.attrs.get("transposed", False)
    )
    return b("moe.row_scale", product, scale, hint=op.result.hint)


def scale_to_other_side(b: Builder, op: Op, made: Op) -> Any:
    """``(c g)' a = g' (c a)``: the gathered side stays unscaled, so it can be gathered by the
    kernel.
    """
    rows, scale = made.operands
    other = b("moe.row_scale", op.operands[1], scale)
    return b("moe.grouped_outer", rows, other, op.operands[2], hint=op.result.hint)


def scale_to_first_side(b: Builder, op: Op, made: Op) -> Any:
    """``a' (c g) = (c a)' g``: the mirror image, for transposed weights."""
    rows, scale = made.operands
    other = b("moe.row_scale", op.operands[0], scale)
    return b("moe.grouped_outer", other, rows, op.operands[2], hint=op.result.hint)


# kind of the op, operand to look at, kind of what made it -> rule
RULES = (
    ("moe.row_dot", 0, "moe.grouped_mm", dot_through_product),
    ("moe.row_dot", 0, "t.add", dot_of_sum),
    ("moe.grouped_mm", 0, "moe.row_scale", scale_after_product),
    ("moe.grouped_outer", 0, "moe.row_scale", scale_to_other_side),
    ("moe.grouped_outer", 1, "moe.row_scale", scale_to_first_side),
)


@register("adjoint")
def adjoint(graph: Graph) -> Graph:
    """Use linearity so that the backward pass needs no expert output.

    The gradient of a routing weight, an inner product with the expert's output, becomes one with
    the expert's activation; row scales move behind the products, where epilogues apply them. The
    identity is SonicMoE's; here it follows from five algebraic rules.
    """
    if not graph.cotangents:
        return graph
    return fixpoint(graph, _apply, "adjoint")


def _apply(graph: Graph) -> Graph:
    definitions = Definitions(graph)

    def rule(builder: Builder, op: Op) -> Any:
        for kind, place, source, rewrite in RULES:
            if op.kind != kind:
                continue
            made = definitions.of(builder, op.operands[place])
            if made is None or made.kind != source:
                continue
            problem = _problem(op, place, made, definitions, builder)
            found = None if problem else rewrite(builder, op, made)
            name = rewrite.__name__.replace("_", "-")
            if found is not None:
                chose(name)
                return found
            decline(name, op, problem or "the two terms have other types")
        return None

    return transform(graph, rule, "adjoint")


def _problem(op: Op, place: int, made: Op, definitions: Definitions, builder: Builder) -> str:
    """Why a rule whose pattern fits is not applied; empty if it is."""
    if not _is_gathered(made, made.kind, definitions, builder):
        return "the scaled rows come from no gather: moving the scale would only repeat it"
    if _is_between_gathers(op, place, definitions, builder):
        return "the other side is gathered too: the scale would move to and fro"
    return ""


def _is_between_gathers(op: Op, place: int, definitions: Definitions, builder: Builder) -> bool:
    """Whether a product's other side is gathered too: the scale would move to and fro for ever."""
    if op.kind != "moe.grouped_outer":
        return False
    other = definitions.of(builder, op.operands[1 - place])
    return other is not None and other.kind == "moe.gather"


def _is_gathered(made: Op, source: str, definitions: Definitions, builder: Builder) -> bool:
    """A row scale moves only off a gathered operand: anywhere else it would be applied twice for
    nothing.
    """
    if source != "moe.row_scale":
        return True
    inner = definitions.of(builder, made.operands[0])
    return inner is not None and inner.kind == "moe.gather"
