"""What operations of a captured step are called: where in the model they come from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import fx

from moec.runtime.part_ops import part_of


def module_path(node: fx.Node) -> str:
    """The module whose code a node is from, as "model.layers.3.mlp"; empty if it is not known."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
    if not isinstance(stack, Mapping) or not stack:
        return ""
    raw = str(list(stack.values())[-1][0])
    dotted = re.sub(r"\[['\"]?(\w+)['\"]?\]", r".\1", raw)
    plain = dotted.replace(".__dict__._modules.", ".")  # how a tracer names what a wrapper holds
    return plain.removeprefix("L.self").removeprefix("L.module").strip(".")


def source_line(node: fx.Node) -> str:
    """The line of the model's code that a node is from, as "file.py:57"; empty if not known."""
    trace = str(node.meta.get("stack_trace") or "")
    places = re.findall(r'File "([^"]+)", line (\d+)', trace)
    places = [place for place in places if "/moec/" not in place[0]]
    if not places:
        return ""
    path, line = places[-1]
    return f"{path.rsplit('/', 1)[-1]}:{line}"


def operation(node: fx.Node) -> str:
    """The operation's short name, as "mm"; of a part of a region what it computes, and its line."""
    target: Any = node.target
    found = part_of(target)
    if found is not None:
        loc = found.part.loc
        return found.part.title if loc is None else f"{found.part.title} ({loc.file}:{loc.line})"
    packet = getattr(target, "overloadpacket", target)
    return str(getattr(packet, "__name__", packet)).split(".")[-1]


def label(node: fx.Node, is_backward: bool) -> str:
    """A name for people: "model.layers.3.self_attn.q_proj: mm (backward)"; of what is of no module
    "_log_softmax (loss_utils.py:42)".
    """
    path = module_path(node)
    place = source_line(node) or node.name
    name = f"{path}: {operation(node)}" if path else f"{operation(node)} ({place})"
    return f"{name} (backward)" if is_backward else name


def size_names(graph: fx.Graph) -> dict[sympy.Symbol, str]:
    """What the symbols of a graph's sizes are: "input_ids.shape[1]"."""
    found: dict[sympy.Symbol, str] = {}
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt) and isinstance(value.node.expr, sympy.Symbol):
            symbol = value.node.expr
            sources = value.node.shape_env.var_to_sources.get(symbol, ())
            found[symbol] = _readable(str(sources[0].name)) if sources else str(symbol)
    return found


def _readable(source: str) -> str:
    """Of ``L['kwargs']['input_ids'].size()[1]`` what a user would write."""
    dotted = re.sub(r"\[['\"](\w+)['\"]\]", r".\1", source)
    return dotted.removeprefix("L.").removeprefix("kwargs.").replace(".size()", ".shape")


__all__ = ["label", "module_path", "operation", "size_names", "source_line"]
