"""A second module tree over the same tensors: what :func:`moec.compile` returns."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import nn

from moec.errors import CompileError

M = TypeVar("M", bound=nn.Module)


def share(model: M) -> M:
    """A copy of the module tree whose parameters and buffers are the original's, registry included.

    Replacing a parameter, moving the model or loading a state dict through one is seen by the
    other; ``train()``/``eval()`` and replaced submodules are not.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for tensor in _tensors_of(module):
            memo[id(tensor)] = tensor
        for hook in _hooks_of(module):
            memo[id(hook)] = hook  # a hook's owner must go on hearing from it
        for name in ("config", "generation_config"):
            setting = vars(module).get(name)
            if setting is not None:
                memo[id(setting)] = setting
    try:
        for old, new in _shells(model, memo):
            _fill(old, new, memo)
        twin = copy.deepcopy(model, memo)
    except Exception as error:  # any attribute may refuse to be copied, with any error
        raise CompileError(
            f"{type(model).__name__} holds something that cannot be copied ({error}); moec "
            "shares the weights but copies the module tree. "
            "Compile before adding it, or remove it from the module."
        ) from error
    for old, new in zip(model.modules(), twin.modules(), strict=True):
        new._parameters, new._buffers = old._parameters, old._buffers
    return twin


def trial_copy(model: M) -> M:
    """A module on which calls can be tried that may be wrong: itself on the CPU, else a copy there.

    An index out of range is an error on the CPU. On a GPU it ends all work of the process.
    """
    if not is_on_gpu(model):
        return model
    memo: dict[int, Any] = {}
    for module in model.modules():
        memo.update({id(t): _on_cpu(t) for t in _tensors_of(module)})
        memo.update({id(hook): hook for hook in _hooks_of(module)})
        shared = (vars(module).get(name) for name in ("config", "_moec_region", "_moec_interface"))
        memo.update({id(value): value for value in shared if value is not None})
    return copy.deepcopy(model, memo)


def is_on_gpu(model: nn.Module) -> bool:
    """Whether a tensor of a model is in a GPU's memory."""
    return any(t.is_cuda for m in model.modules() for t in _tensors_of(m))


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    found = tensor.detach().to("cpu", copy=True)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(found, requires_grad=tensor.requires_grad)
    return found


def _shells(model: nn.Module, memo: dict[int, Any]) -> list[tuple[nn.Module, nn.Module]]:
    """Empty twins of the modules that ``fully_shard`` or ``replicate`` manages; they refuse to be
    copied.
    """
    managed = [m for m in model.modules() if is_managed(m)]
    pairs = [(m, object.__new__(type(m))) for m in managed]  # their own __new__ is for indexing
    memo.update({id(old): new for old, new in pairs})
    memo.update({id(state): state for m in managed for state in _states_of(m)})
    return pairs


def _states_of(module: nn.Module) -> Iterator[Any]:
    """What torch.distributed keeps in a module's attributes."""
    for value in vars(module).values():
        for item in value.values() if isinstance(value, dict) else [value]:
            if type(item).__module__.startswith("torch.distributed."):
                yield item


def is_managed(module: nn.Module) -> bool:
    """Whether ``fully_shard`` or ``replicate`` was called on a module."""
    refusal = getattr(type(module), "__deepcopy__", None)
    return getattr(refusal, "__module__", "").startswith("torch.distributed.")


def _fill(old: nn.Module, new: nn.Module, memo: dict[int, Any]) -> None:
    """Give a twin its own submodules, and the state that gathers the weights, which it shares.

    That state swaps the entries of ``_parameters``; the twin has the same dictionary.
    """
    from torch.distributed import _composable_state as states

    vars(new).update({k: copy.deepcopy(v, memo) for k, v in vars(old).items()})
    state = states._get_module_state(old)
    if state is not None:
        states._insert_module_state(new, state)


def _hooks_of(module: nn.Module) -> list[Any]:
    registries = (v for k, v in vars(module).items() if k.endswith("_hooks"))
    registries = (v for v in registries if isinstance(v, dict))
    return [hook for registry in registries for hook in registry.values()]


def _tensors_of(module: nn.Module) -> list[torch.Tensor]:
    own = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
    return own + [v for v in vars(module).values() if isinstance(v, torch.Tensor)]
