"""Experts inside a module that changes their weights, such as a low-rank adapter.

An adapter of stacked weights is a module around the experts: it takes their arguments, whatever
they are, computes other weights from its own and theirs, and calls the experts with those. Recorded
from outside, its result is a function of the tokens, the indices, the weights of routing and the
parameters of both, as that of plain experts is.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from moec.capture.counts import may_hold_experts


def core_of(module: nn.Module) -> nn.Module | None:
    """The experts module that ``module`` is, or that it wraps with weights of its own.

    A wrapper without weights (of data parallelism, of checkpointing) does something that no
    recording of values shows, so it is none of these.
    """
    if has_experts_contract(module):
        return module
    if not _passes_arguments_on(module):
        return None
    children = {name: core_of(child) for name, child in module.named_children()}
    cores = {name: core for name, core in children.items() if core is not None}
    if len(cores) != 1 or not _has_other_weights(module, next(iter(cores))):
        return None
    return next(iter(cores.values()))


def has_experts_contract(module: nn.Module) -> bool:
    """Whether a module is called as ``forward(x, idx, w)`` and holds weights of several experts."""
    is_stacked = any(t.dim() == 3 for t in own_weights(module))
    return (is_stacked or may_hold_experts(module)) and len(_positional(module)) == 3


def own_weights(module: nn.Module) -> list[torch.Tensor]:
    """The parameters of a module itself, those behind a parametrization among them."""
    weights: list[torch.Tensor] = list(module.parameters(recurse=False))
    if parametrize.is_parametrized(module):
        lists: Any = module.parametrizations
        weights += [p for held in lists.values() for p in held.parameters(recurse=False)]
    return weights


def _forward_of(module: nn.Module) -> Any:
    return inspect.unwrap(type(module).forward)


def _parameters(module: nn.Module) -> list[inspect.Parameter]:
    return list(inspect.signature(_forward_of(module)).parameters.values())[1:]


def _positional(module: nn.Module) -> list[inspect.Parameter]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p for p in _parameters(module) if p.kind in kinds]


def _passes_arguments_on(module: nn.Module) -> bool:
    if _forward_of(module) is nn.Module.forward:  # a list or a dictionary of modules
        return False
    variadic = any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in _parameters(module))
    return variadic and len(_positional(module)) <= 3


def _has_other_weights(module: nn.Module, child: str) -> bool:
    return any(not name.startswith(f"{child}.") for name, _ in module.named_parameters())


@contextlib.contextmanager
def plain_forward(core: nn.Module) -> Iterator[None]:
    """Within the context the experts run the code in their class's source, without decorators."""
    with forward_replaced(core, functools.partial(_forward_of(core), core)):
        yield


@contextlib.contextmanager
def forward_replaced(module: nn.Module, forward: Any) -> Iterator[None]:
    """Within the context, calls of ``module`` go to another function."""
    own = vars(module)
    saved = own.get("forward")
    own["forward"] = forward
    try:
        yield
    finally:
        if saved is None:
            del own["forward"]
        else:
            own["forward"] = saved


def experts_arguments(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[Any]:
    """Tokens, indices and weights of a call of experts or of a wrapper, in this order.

    Raises ``TypeError`` if the call does not fit the experts' signature.
    """
    core = core_of(module)
    signature = inspect.signature(_forward_of(module if core is None else core))
    bound = signature.bind(module, *args, **kwargs)
    return list(bound.arguments.values())[1:4]


__all__ = [
    "core_of",
    "experts_arguments",
    "forward_replaced",
    "has_experts_contract",
    "own_weights",
    "plain_forward",
]
