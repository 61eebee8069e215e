"""``torch.compile(model, backend="moec")``: moec's grouped products inside a Dynamo graph.

Hugging Face models reach Dynamo as a sort, two grouped products and pointwise work around them. The
backend puts compiled grouped products (forward and backward) in place of PyTorch's, and causal
attention in place of attention with a causal mask; it hands the rest to another backend. Whole
blocks are compiled by :func:`moec.compile`, whose regions pass through here as single ops; both can
be combined.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from moec.causal_masks import with_causal_attention
from moec.errors import CompileError
from moec.ir.builder import Builder
from moec.ir.dims import dim
from moec.ir.graph import Graph, Value
from moec.ir.types import Type, dtype_name
from moec.runtime.library import op_name
from moec.session import Session


def backend(
    module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    inner: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """The Dynamo backend ``moec``.

    ``options={"inner": NAME}`` names the backend for everything else: by default "inductor" on a
    GPU and "aot_eager" on the CPU. Raises :class:`CompileError` for another option.
    """
    settings = dict(options or {})
    inner = settings.pop("inner", inner)
    if settings:
        raise CompileError(
            f"backend 'moec' has no option {', '.join(map(repr, settings))}; "
            "it has 'inner', the backend for the rest"
        )
    session, module = Session(), with_causal_attention(module)
    for node in list(module.graph.nodes):
        if is_grouped_product(node):
            replace_product(module.graph, node, session)
    module.graph.lint()
    module.recompile()
    compiled: Callable[..., Any] = _inner_backend(inner, example_inputs)(module, example_inputs)
    return compiled


def _inner_backend(name: str | None, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    on_gpu = any(isinstance(t, torch.Tensor) and t.is_cuda for t in example_inputs)
    from torch._dynamo.backends.registry import lookup_backend

    found: Callable[..., Any] = lookup_backend(name or ("inductor" if on_gpu else "aot_eager"))
    return found


def is_grouped_product(node: fx.Node) -> bool:
    """Whether a call is a product of ragged rows ``[A, K]`` with stacked matrices ``[E, K, N]``."""
    name = str(getattr(node.target, "__name__", node.target))
    if node.op != "call_function" or "grouped_mm" not in name or _offsets_of(node) is None:
        return False
    operands = [a.meta.get("example_value") for a in node.args[:2] if isinstance(a, fx.Node)]
    return [v.dim() for v in operands if isinstance(v, torch.Tensor)] == [2, 3]


def _offsets_of(node: fx.Node) -> fx.Node | None:
    offsets = node.kwargs.get("offs", node.args[2] if len(node.args) > 2 else None)
    return offsets if isinstance(offsets, fx.Node) else None


def replace_product(graph: fx.Graph, node: fx.Node, session: Session) -> None:
    """Put a compiled product in place of a call."""
    x, w, offsets = node.args[0], node.args[1], _offsets_of(node)
    if not isinstance(x, fx.Node) or not isinstance(w, fx.Node) or offsets is None:
        return
    source, transposed = _untransposed(w)
    left, right = x.meta["example_value"], source.meta["example_value"]
    product = product_graph(dtype_name(left.dtype), tuple(int(s) for s in right.shape), transposed)
    wanted = (left.requires_grad, right.requires_grad, False)
    artifact = session.artifact(
        product, wanted if torch.is_grad_enabled() and any(wanted) else None, right.device
    )
    if artifact is None:
        return
    op = getattr(torch.ops.moec, op_name(artifact))
    with graph.inserting_before(node):
        padded = graph.call_function(torch.nn.functional.pad, (offsets, (1, 0)))
        integers = graph.call_method("to", (padded, torch.int32))
        results = graph.call_function(op, ([x, source, integers],))
        result = graph.call_function(_first, (results,))
    result.meta.update(node.meta)
    node.replace_all_uses_with(result)
    graph.erase_node(node)


def _first(results: Sequence[torch.Tensor]) -> torch.Tensor:
    return results[0]


def _untransposed(w: fx.Node) -> tuple[fx.Node, bool]:
    """The stacked weights in memory order, and whether the product reads them as ``[E, in,
    out]``.
    """
    swapped = (
        w.op == "call_method" and w.target == "transpose" and set(w.args[1:]) in ({-2, -1}, {1, 2})
    )
    source = w.args[0] if w.args else None
    return (source, False) if swapped and isinstance(source, fx.Node) else (w, True)


def product_graph(dtype: str, shape: tuple[int, ...], transposed: bool) -> Graph:
    """The IR of one grouped product with weights of a shape."""
    builder = Builder({"A": (0, 2**31 - 1)})
    inner = shape[1] if transposed else shape[2]
    x = Value(Type(dtype, (dim("A"), inner)), "x")
    w = Value(Type(dtype, shape), "w")
    offsets = Value(Type("i32", (shape[0] + 1,)), "offsets")
    result = builder("moe.grouped_mm", x, w, offsets, transposed=transposed, hint="y")
    return builder.graph("grouped_product", [x, w, offsets], [result])


__all__ = ["backend"]
