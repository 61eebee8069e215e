"""A second module tree over the same tensors: what :func:`moec.compile` returns."""

from __future__ import annotations

import copy
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


def _hooks_of(module: nn.Module) -> list[Any]:
    registries = (v for k, v in vars(module).items() if k.endswith("_hooks"))
    registries = (v for v in registries if isinstance(v, dict))
    return [hook for registry in registries for hook in registry.values()]


def _tensors_of(module: nn.Module) -> list[torch.Tensor]:
    own = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
    return own + [v for v in vars(module).values() if isinstance(v, torch.Tensor)]
