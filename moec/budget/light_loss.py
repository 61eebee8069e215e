"""Cross entropy in light operations, which one kernel each computes from the logits.

As captured, the loss keeps logarithms of probabilities in float32, and its gradient is a tensor of
that size twice: of all values that a step holds, these are the largest. Row by row all of it
follows from the logits and two numbers, so nothing of that size need be written but the gradient of
the logits, in their own number format. The results are those of PyTorch's formulas: the maximum is
subtracted before exponents are taken, sums are in float32.

A label that is none of the classes makes the loss NaN; PyTorch stops there with an assertion.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

_MEAN, _SUM = 1, 2  # of ATen's reductions


def with_light_losses(graph: fx.Graph) -> None:
    """Write every cross entropy of a joint graph over rows [N, classes] as light operations, in
    place; one with weights of classes or without a reduction stays as it is.
    """
    for node in list(graph.find_nodes(op="call_function", target=aten.nll_loss_forward.default)):
        found = _read(node)
        if found is not None:
            _rewrite(found)
    graph.eliminate_dead_code()


@dataclass(frozen=True)
class _Loss:
    """The nodes of a cross entropy; ``behind`` are pairs of nodes: the gradient of the logarithms,
    which nothing else reads, and that of the logits.
    """

    softmax: fx.Node
    loss: fx.Node
    behind: tuple[tuple[fx.Node, fx.Node], ...]


def _read(loss: fx.Node) -> _Loss | None:
    logarithms, labels, weight, reduction, _ = loss.args
    softmax = _source(logarithms)
    if weight is not None or reduction not in (_MEAN, _SUM) or softmax is None:
        return None
    if softmax.target is not aten._log_softmax.default or not isinstance(labels, fx.Node):
        return None
    rows, dim = softmax.args[0], softmax.args[1]
    if not isinstance(rows, fx.Node) or _tensor(rows).dim() != 2 or dim not in (1, -1):
        return None
    if not isinstance(_tensor(rows).shape[1], int) or _tensor(softmax).dtype != torch.float32:
        return None
    behind = tuple(_gradients(loss, softmax))
    return None if None in behind else _Loss(softmax, loss, tuple(b for b in behind if b))


def _gradients(loss: fx.Node, softmax: fx.Node) -> Iterator[tuple[fx.Node, fx.Node] | None]:
    """The pairs of :class:`_Loss`; ``None`` for one of another form."""
    graph = loss.graph
    for node in graph.find_nodes(op="call_function", target=aten.nll_loss_backward.default):
        if _source(node.args[1]) is not softmax:
            continue
        users = list(node.users)
        is_pair = (
            len(users) == 1
            and users[0].target is aten._log_softmax_backward_data.default
            and users[0].args[0] is node
            and _source(users[0].args[1]) is softmax
            and node.args[3] is None
        )
        yield (node, users[0]) if is_pair else None


def _source(node: Any) -> fx.Node | None:
    """The node behind copies of a name."""
    while isinstance(node, fx.Node) and node.target is aten.detach.default:
        node = node.args[0]
    return node if isinstance(node, fx.Node) else None


def _tensor(node: fx.Node) -> torch.Tensor:
    value: torch.Tensor = node.meta["val"]
    return value


class _Inserter:
    """Adds operations before a node, with what is known of it."""

    def __init__(self, place: fx.Node) -> None:
        self.place = place

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        graph = self.place.graph
        values = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        with graph.inserting_before(self.place):
            node = graph.call_function(target, args, kwargs)
        mode = _mode(self.place)
        with mode:
            made = target(*values[0], **values[1])
        node.meta = {**self.place.meta, "val": made}
        return node


def _mode(node: fx.Node) -> Any:
    value = node.meta["val"]
    first = value[0] if isinstance(value, (tuple, list)) else value
    return first.fake_mode


def _rewrite(found: _Loss) -> None:
    """Put light operations in the place of a cross entropy."""
    logarithms = _logarithms(_Inserter(found.softmax), found.softmax)
    results = _forward(_Inserter(found.loss), logarithms, found.loss)
    for user in list(found.loss.users):  # one of its two results each
        user.replace_all_uses_with(results[int(user.args[1])])  # type: ignore[arg-type]
    for gradient, result in found.behind:
        made = _backward(_Inserter(result), logarithms, gradient, result)
        result.replace_all_uses_with(made)
    found.softmax.replace_all_uses_with(logarithms)


def _logarithms(add: _Inserter, softmax: fx.Node) -> fx.Node:
    """The logarithms of probabilities [N, classes] in float32."""
    rows: Any = softmax.args[0]
    if _tensor(rows).dtype != torch.float32:
        rows = add(aten._to_copy.default, rows, dtype=torch.float32)
    shifted = add(aten.sub.Tensor, rows, add(aten.amax.default, rows, [1], True))
    total = add(aten.sum.dim_IntList, add(aten.exp.default, shifted), [1], True)
    return add(aten.sub.Tensor, shifted, add(aten.log.default, total))


def _forward(add: _Inserter, logarithms: fx.Node, loss: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The loss, and the number of rows that count in it."""
    _, labels, _, reduction, ignored = loss.args
    counts = add(aten.ne.Scalar, labels, ignored)
    number = add(aten.sum.default, add(aten._to_copy.default, counts, dtype=torch.float32))
    own = _where(add, _hits(add, labels, logarithms), logarithms, 0.0)
    each = add(aten.neg.default, add(aten.sum.dim_IntList, own, [1]))
    total = add(aten.sum.default, _where_counted(add, counts, labels, logarithms, each))
    value = add(aten.div.Tensor, total, number) if reduction == _MEAN else total
    return value, number


def _backward(add: _Inserter, logarithms: fx.Node, gradient: fx.Node, result: fx.Node) -> fx.Node:
    """The gradient of the logits. The sum of a row of the gradient of logarithms is that of its
    label, the only one that is not zero.
    """
    given, _, labels, _, reduction, ignored, number = gradient.args
    scale = add(aten.neg.default, given)
    if reduction == _MEAN:
        scale = add(aten.div.Tensor, scale, number)
    counts = add(aten.ne.Scalar, labels, ignored)
    each = add(aten.unsqueeze.default, _where_counted(add, counts, labels, logarithms, scale), 1)
    own = _where(add, _hits(add, labels, logarithms), each, 0.0)
    share = add(aten.mul.Tensor, add(aten.exp.default, logarithms), each)
    made = add(aten.sub.Tensor, own, share)
    wanted = _tensor(result).dtype
    return made if wanted == torch.float32 else add(aten._to_copy.default, made, dtype=wanted)


def _hits(add: _Inserter, labels: Any, logarithms: fx.Node) -> fx.Node:
    """Which element of each row is its label's: booleans [N, classes]."""
    value = _tensor(logarithms)
    classes = add(aten.arange.default, value.shape[1], device=value.device)
    return add(aten.eq.Tensor, add(aten.unsqueeze.default, labels, 1), classes)


def _where_counted(
    add: _Inserter, counts: fx.Node, labels: Any, logarithms: fx.Node, value: fx.Node
) -> fx.Node:
    """``value`` for each row that counts and 0 for others; NaN where a label is no class."""
    is_class = add(
        aten.logical_and.default,
        add(aten.ge.Scalar, labels, 0),
        add(aten.lt.Scalar, labels, _tensor(logarithms).shape[1]),
    )
    return _where(add, counts, _where(add, is_class, value, math.nan), 0.0)


def _where(add: _Inserter, condition: fx.Node, value: fx.Node, other: float) -> fx.Node:
    device = _tensor(value).device
    number = add(aten.scalar_tensor.default, other, dtype=torch.float32, device=device)
    return add(aten.where.self, condition, value, number)


__all__ = ["with_light_losses"]
