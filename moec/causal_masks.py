"""Attention masks that say nothing but "not what comes later" give way to attention that knows it.

Code that is traced cannot look whether a mask has anything to say, so the models of transformers
make one of size [length, length] wherever a tracer sees them, and attention with a mask is slower
than causal attention, which needs none. In a tracer's graph the mask is a function of sizes alone.
That function is evaluated here, at small sizes and beyond the number that occurs in it (the width
of a window, say): where it is causal at all of them, the mask goes. Masks that depend on data, as
on padding, stay.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from moec.surroundings import isolated

ATTENTION = torch.nn.functional.scaled_dot_product_attention
# The largest number in the code of a mask, as the width of a window, that is tried
_LARGEST = 4096
_SIZES = (2, 3, 5, 8, 17, 64)
_BATCHES = (1, 3)
_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


def with_causal_attention(module: fx.GraphModule) -> fx.GraphModule:
    """A tracer's graph in which attention with a causal mask is causal attention; the graph itself
    where there is none.
    """
    if not any(_mask(node) is not None for node in module.graph.nodes):
        return module
    made = copy.copy(module)
    made.graph = copy.deepcopy(module.graph)
    known: dict[fx.Node, bool] = {}
    for node in list(made.graph.nodes):
        mask = _mask(node)
        if mask is None or not _is_square(node, mask):
            continue
        if mask not in known:
            known[mask] = _is_causal(mask)
        if known[mask]:
            given = dict(zip(_NAMES, node.args, strict=False)) | node.kwargs
            node.args, node.kwargs = (), given | {"attn_mask": None, "is_causal": True}
    if not any(known.values()):
        return module
    for mask in known:
        _erase_unused(mask)
    made.recompile()
    return made


def _mask(node: fx.Node) -> fx.Node | None:
    """The mask of booleans that an attention reads."""
    if node.op != "call_function" or node.target is not ATTENTION:
        return None
    given = dict(zip(_NAMES, node.args, strict=False)) | node.kwargs
    mask = given.get("attn_mask")
    value = _value(mask)
    if given.get("is_causal") or not isinstance(value, torch.Tensor):
        return None
    return mask if isinstance(mask, fx.Node) and value.dtype is torch.bool else None


def _value(node: Any) -> Any:
    return node.meta.get("example_value") if isinstance(node, fx.Node) else None


def _is_square(node: fx.Node, mask: fx.Node) -> bool:
    """Whether there is a key for each query, and the mask is of both."""
    given = dict(zip(_NAMES, node.args, strict=False)) | node.kwargs
    query, key = _value(given["query"]), _value(given["key"])
    if not isinstance(query, torch.Tensor) or not isinstance(key, torch.Tensor):
        return False
    lengths = [query.shape[-2], key.shape[-2], *_value(mask).shape[-2:]]
    return len(set(map(_expression, lengths))) == 1


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def _is_causal(mask: fx.Node) -> bool:
    nodes = _behind(mask)
    symbols, length = _symbols(nodes), _expression(_value(mask).shape[-1])
    lengths = _lengths(nodes, length)
    if symbols is None or lengths is None:
        return False
    others = sorted((s for s in symbols if s != length), key=str)
    cases = (
        {length: size, **dict.fromkeys(others, batch)}
        for size, batch in itertools.product(lengths, _BATCHES if others else (1,))
    )
    device = _value(mask).device
    try:
        return all(isolated(_checked(nodes, mask, case), device) for case in cases)
    except Exception:  # it is a program of somebody else's; where it fails the mask stays
        return False


def _lengths(nodes: Sequence[fx.Node], length: Any) -> Sequence[int] | None:
    """The lengths that stand for all: the one there is, or small ones and those beyond the number
    in the code; ``None`` where none do.
    """
    if isinstance(length, int):
        return [length] if length <= 4 * _LARGEST else None
    numbers = _numbers(nodes)
    if numbers is None or not isinstance(length, sympy.Symbol):
        return None
    return sorted({*_SIZES, *(n + beyond for n in numbers for beyond in (1, 2))})


def _checked(
    nodes: Sequence[fx.Node], mask: fx.Node, sizes: Mapping[sympy.Symbol, int]
) -> Callable[[], bool]:
    """Whether the mask is causal at some sizes, as a call."""

    def check() -> bool:
        values: dict[fx.Node, Any] = {}
        for node in nodes:
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            if node.op == "placeholder":
                values[node] = sizes[_expression(_value(node))]
            elif node.op == "call_function":
                values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
            else:
                values[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        found: torch.Tensor = values[mask]
        length = found.shape[-1]
        causal = torch.ones(length, length, dtype=torch.bool, device=found.device).tril()
        return bool((found == causal).all())

    return check


def _behind(mask: fx.Node) -> list[fx.Node]:
    """A node and all that it follows from, in order."""
    found, waiting = {mask}, [mask]
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                waiting.append(source)
    return [node for node in mask.graph.nodes if node in found]


def _symbols(nodes: Sequence[fx.Node]) -> set[sympy.Symbol] | None:
    """The sizes that a mask follows from; ``None`` if it follows from anything else."""
    found = set()
    for node in nodes:
        if node.op in ("get_attr", "call_module", "output"):
            return None
        if node.op == "placeholder":
            symbol = _expression(_value(node))
            if not isinstance(symbol, sympy.Symbol):
                return None
            found.add(symbol)
    shape = map(_expression, _value(nodes[-1]).shape)
    return found if found <= set(shape) else None


def _numbers(nodes: Sequence[fx.Node]) -> set[int] | None:
    """The numbers above 1 in the code of a mask; ``None`` where there is a large one, or several,
    whose products could matter, too.
    """
    given = itertools.chain.from_iterable(_constants((n.args, n.kwargs)) for n in nodes)
    found = {abs(number) for number in given if abs(number) > 1}
    return found if len(found) <= 1 and all(n <= _LARGEST for n in found) else None


def _constants(value: Any) -> Iterator[int]:
    match value:
        case bool() | None | str() | fx.Node():
            return
        case int():
            yield value
        case float():
            yield int(value) if value == int(value) else _LARGEST + 1
        case slice():
            yield from _constants((value.start, value.stop, value.step))
        case dict():
            yield from _constants(tuple(value.values()))
        case tuple() | list():
            for element in value:
                yield from _constants(element)


def _erase_unused(mask: fx.Node) -> None:
    """Take a mask out of the graph, with what nothing but it followed from."""
    for node in reversed(_behind(mask)):
        if node.op != "placeholder" and not node.users:
            mask.graph.erase_node(node)


__all__ = ["with_causal_attention"]
