"""The step of a model as a graph, captured without running it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import TorchDynamoException
from torch.utils import _pytree as pytree

from moec.budget.light_loss import with_light_losses
from moec.budget.loss_alone import with_loss_alone
from moec.budget.parts import cut_regions
from moec.budget.steps import Captured, draws_random_numbers, read_joint
from moec.budget.uncaptured import uncaptured
from moec.causal_masks import with_causal_attention
from moec.errors import CompileError
from moec.model_scope import traced_once


class _Seen(Exception):
    """Ends a compilation when the joint graph is there."""


def captured_step(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    in_parts: bool = True,
    is_fused: bool = False,
) -> Captured:
    """The joint graph of a model's forward and backward pass for a call; nothing is computed.

    The sizes of ``args`` and ``kwargs`` stay symbols; a model from :func:`moec.compile` has its
    regions in it: each pass as its parts, or as one operation without ``in_parts``. ``is_fused``:
    it is for a device for which groups of light operations are compiled.

    Raises:
        CompileError: the step is no single graph.
    """
    found: list[Captured] = []

    def partition(joint: fx.GraphModule, _: Any, *, num_fwd_outputs: int, **__: Any) -> Any:
        if in_parts:
            cut_regions(joint.graph)
        if is_fused:
            with_light_losses(joint.graph)
        found.append(read_joint(joint.graph, num_fwd_outputs))
        raise _Seen

    def backend(module: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        module = with_causal_attention(module)
        for made in dict.fromkeys((with_loss_alone(module)[0], module)):
            with contextlib.suppress(_Seen):
                run = aot_autograd(
                    fw_compiler=lambda module, _: module.forward,
                    bw_compiler=lambda module, _: module.forward,
                    partition_fn=partition,
                )(made, inputs)
                return run
            if not any(map(draws_random_numbers, found[-1].graph.nodes)):
                break
        raise _Seen

    run = torch.compile(model.forward, fullgraph=True, dynamic=True, backend=backend)
    try:
        with traced_once(pytree.tree_leaves((args, kwargs))):
            run(*args, **kwargs)
    except (_Seen, TorchDynamoException) as error:
        if not found:
            raise uncaptured(model, type(model).__name__, error) from error
    if not found:
        raise CompileError(f"{type(model).__name__} has no gradients: no parameter asks for one")
    return found[-1]


__all__ = ["captured_step"]
