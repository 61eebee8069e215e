"""Putting one opaque op in place of a loop in a recording, from a match of what routes it."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from moec.capture.block import _LEAF
from moec.capture.explained import Match
from moec.capture.forms import ALL, INDICES, PICKS, TURNED_PICKS, Form
from moec.capture.recorder import Recorder

aten = torch.ops.aten
MATCHED = (
    INDICES,
    Form("TKE", "TK"),
    Form("TE", "TE"),
    ALL,
    PICKS,
)  # the op's last argument is one's number


def replace_loop(recorder: Recorder, match: Match, tokens: int, experts: int) -> None:
    """Put the opaque op in place of the loop's result."""
    graph = recorder.graph
    with graph.inserting_after(list(graph.nodes)[-1]):
        operands = _operands(graph, match, tokens, experts)
    form = PICKS if match.form == TURNED_PICKS else match.form
    leaf = graph.call_function(_LEAF, (*operands, MATCHED.index(form)))
    value = match.result.meta["val"]
    leaf.meta.update(val=value.reshape(tokens, -1), location=match.result.meta.get("location"))
    result = leaf if value.dim() == 2 else _view(graph, leaf, value)
    match.result.meta["replaced"] = result
    for user in list(match.result.users):
        if user not in (leaf, result, *operands):
            user.replace_input_with(match.result, result)
    recorder.nodes.update({k: result for k, n in recorder.nodes.items() if n is match.result})


def restore_loop(recorder: Recorder, match: Match) -> None:
    """Undo :func:`replace_loop`."""
    result = match.result.meta.pop("replaced", None)
    if result is None:
        return
    result.replace_all_uses_with(match.result)
    recorder.nodes.update({k: match.result for k, n in recorder.nodes.items() if n is result})


def _operands(graph: fx.Graph, match: Match, tokens: int, experts: int) -> list[fx.Node]:
    """The tokens, the routing and the weights of a match in the shapes that their form has."""
    if match.form in (PICKS, TURNED_PICKS):
        return [_in_form(graph, match.x, tokens, "TH"), *_picked(graph, match)]
    routing = _in_form(graph, match.routing, tokens, match.form.routing)
    if match.w is None:
        value = routing.meta["val"]
        value = value if value.dim() == 2 else value[..., 0]
        w = _ones(graph, routing, match.x.meta["val"], value.shape)
    else:
        w = _in_form(graph, match.w, tokens, match.form.weights)
        w = _taken(graph, w, routing, experts) if match.by_expert else w
    if match.keep is not None:
        keep = _of_all_choices(graph, _in_form(graph, match.keep, tokens, "TK"), routing)
        routing = _without(graph, routing, aten.eq.Scalar, keep, 0, experts)
    if match.form == INDICES and int(match.routing.meta["val"].min()) < 0:
        routing = _without(graph, routing, aten.lt.Scalar, routing, 0, experts)
    if match.form == INDICES and int(match.routing.meta["val"].max()) > experts:
        routing = _without(graph, routing, aten.ge.Scalar, routing, experts, experts)
    return [_in_form(graph, match.x, tokens, "TH"), routing, w]


def _taken(graph: fx.Graph, w: fx.Node, routing: fx.Node, experts: int) -> fx.Node:
    """The weights of the chosen experts, from a column for each."""
    index, value = routing.meta["val"], w.meta["val"]
    inside = graph.call_function(aten.clamp.default, (routing, 0, experts - 1))
    inside.meta.update(val=index.clamp(0, experts - 1))
    taken = graph.call_function(aten.gather.default, (w, 1, inside))
    taken.meta.update(val=value.gather(1, inside.meta["val"]), location=w.meta.get("location"))
    return taken


def _picked(graph: fx.Graph, match: Match) -> list[fx.Node]:
    """The picks and the weights of a match as ``[E, C]``."""
    picks, w = match.routing, match.w
    if w is None:
        w = _ones(graph, picks, match.x.meta["val"], picks.meta["val"].shape)
    return [picks, w] if match.form == PICKS else [_turned(graph, picks), _turned(graph, w)]


def _turned(graph: fx.Graph, node: fx.Node) -> fx.Node:
    turned = graph.call_function(aten.t.default, (node,))
    turned.meta.update(val=node.meta["val"].t(), location=node.meta.get("location"))
    return turned


def _of_all_choices(graph: fx.Graph, keep: fx.Node, routing: fx.Node) -> fx.Node:
    """A mask with a column a choice; of one column, it is about the choices after the first."""
    mask, choices = keep.meta["val"], routing.meta["val"].shape[1]
    if mask.shape[1] == choices:
        return keep
    first = _ones(graph, routing, mask.long(), (mask.shape[0], 1))
    wide = graph.call_function(aten.expand.default, (keep, [mask.shape[0], choices - 1]))
    wide.meta.update(val=mask.expand(-1, choices - 1))
    joined = graph.call_function(aten.cat.default, ([first, wide], 1))
    joined.meta.update(val=torch.cat([first.meta["val"], wide.meta["val"]], 1))
    return joined


def _in_form(graph: fx.Graph, node: fx.Node, tokens: int, axes: str) -> fx.Node:
    value = node.meta["val"]
    if value.dim() == (len(axes) or 2) and value.shape[0] == tokens:
        return node
    columns = (-1,) if len(axes) < 3 else (-1, value.shape[-1])
    return _view(graph, node, value.reshape(tokens, *columns))


def _ones(graph: fx.Graph, routing: fx.Node, like: torch.Tensor, shape: tuple[int, ...]) -> fx.Node:
    """Ones in a shape, in the dtype of ``like``."""
    value = torch.ones(shape, dtype=like.dtype, device=like.device)
    ones = graph.call_function(aten.ones.default, (list(value.shape),))
    ones.meta.update(val=value, location=routing.meta.get("location"))
    return ones


def _without(
    graph: fx.Graph, routing: fx.Node, comparison: Any, node: fx.Node, number: int, experts: int
) -> fx.Node:
    """Indices with "no expert" where a comparison holds."""
    dropped = graph.call_function(comparison, (node, number))
    dropped.meta.update(val=comparison(node.meta["val"], number))
    filled = graph.call_function(aten.masked_fill.Scalar, (routing, dropped, experts))
    filled.meta.update(val=routing.meta["val"].masked_fill(dropped.meta["val"], experts))
    return filled


def _view(graph: fx.Graph, node: fx.Node, like: torch.Tensor) -> fx.Node:
    view = graph.call_function(aten.view.default, (node, list(like.shape)))
    view.meta.update(val=like, location=node.meta.get("location"))
    return view


__all__ = ["MATCHED", "replace_loop", "restore_loop"]
