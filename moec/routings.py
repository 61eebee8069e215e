"""Inputs that send tokens where compilers go wrong: nowhere, all to one place, to ties."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from moec.inputs import default_dims, random_inputs
from moec.ir import Graph, Value
from moec.ir.graph import Op

Tensors = list[torch.Tensor]
# Sizes of T: none, one, around the edges of small tiles, more than one tile.
TOKENS = (0, 1, 2, 15, 16, 17, 33, 65)


def _routers(graph: Graph) -> list[Value]:
    """The weights and inputs that router logits are made of."""
    made = {v: op for op in graph.ops for v in op.results}
    found: list[Value] = []
    for op in graph.ops:
        if op.kind in ("moe.select", "t.topk", "kern.routing"):
            found += _inputs_above(op.operands[0], made)
    return list(dict.fromkeys(found))


def _inputs_above(value: Value, made: dict[Value, Op]) -> list[Value]:
    stack, seen, found = [value], set[Value](), []
    while stack:
        v = stack.pop()
        if v in seen:
            continue
        seen.add(v)
        op = made.get(v)
        if op is None:
            found.append(v)
        else:
            stack += op.operands
    return found


def random_routing(graph: Graph, tensors: Tensors) -> None:
    """As the inputs are."""


def empty_expert(graph: Graph, tensors: Tensors) -> None:
    """Nearly no token wants the first expert."""
    for router in _two_dimensional(graph, tensors):
        router[:1] -= 6.0 * router.abs().amax()


def one_expert(graph: Graph, tensors: Tensors) -> None:
    """All tokens are alike, so all want the same experts."""
    for value, tensor in zip(graph.inputs, tensors, strict=False):
        if value.hint == "x" and tensor.is_floating_point():
            tensor.copy_(tensor[:1].expand_as(tensor).clone())


def saturated(graph: Graph, tensors: Tensors) -> None:
    """Logits so large that sigmoids are 0 or 1 and a softmax has one winner."""
    for router in _two_dimensional(graph, tensors):
        router *= 200.0


def zeros(graph: Graph, tensors: Tensors) -> None:
    """Every token is zero."""
    for value, tensor in zip(graph.inputs, tensors, strict=False):
        if value.hint == "x":
            tensor.zero_()


def _two_dimensional(graph: Graph, tensors: Tensors) -> Iterator[torch.Tensor]:
    routers = _routers(graph)
    for value, tensor in zip(graph.inputs, tensors, strict=False):
        fits = tensor.dim() == 2 and tensor.numel() and tensor.is_floating_point()
        if fits and value in routers and value.hint != "x":
            yield tensor


ROUTINGS: tuple[Callable[[Graph, Tensors], None], ...] = (
    random_routing,
    empty_expert,
    one_expert,
    saturated,
    zeros,
)


def adversarial_inputs(
    graph: Graph, seed: int, *, float64: bool = True
) -> Iterator[tuple[str, dict[str, int], Tensors]]:
    """Name, sizes and arguments: three routings, at sizes that the seed picks.

    All in float64, or in the declared dtypes. Ties are no part of it: among equal scores any expert
    may win.
    """
    for place in range(3):
        routing = ROUTINGS[(seed + place) % len(ROUTINGS)]
        tokens = TOKENS[(seed * 3 + place * 5) % len(TOKENS)]
        sizes = default_dims(graph, size=tokens)
        tensors = random_inputs(graph, sizes, seed=seed + place, float64=float64)
        routing(graph, tensors)
        yield routing.__name__, sizes, tensors


__all__ = ["ROUTINGS", "TOKENS", "adversarial_inputs"]
