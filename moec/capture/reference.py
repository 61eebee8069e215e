"""What a module's own code computes: the reference that a captured form is compared with."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from moec.call_form import CallForm
from moec.errors import CaptureError


def own_results(
    module: nn.Module, data: Sequence[Any], form: CallForm | None = None
) -> list[torch.Tensor]:
    """The tensors that a module returns for ``data``, given by place or as ``form`` says.

    Libraries put faster implementations before an experts module's own loop, which do not take
    every dtype (grouped products do not take float64). Where such a one fails, the loop under it
    runs: it is what the body was read from. Raises :class:`CaptureError` if that fails, too.
    """

    def call() -> Any:
        return module(*data) if form is None else form.call(module, data)

    try:
        result = call()
    except Exception as error:  # a library's kernels raise errors of many kinds
        result = _by_plain_loop(module, call, data, error)
    return [t for t in tree_flatten(result)[0] if isinstance(t, torch.Tensor)]


def _by_plain_loop(
    module: nn.Module, call: Callable[[], Any], data: Sequence[Any], first: Exception
) -> Any:
    try:
        with plain_loops(module) as count:
            if count:
                return call()
    except Exception as error:  # see above
        raise CaptureError(_failure(module, data, error)) from error
    raise CaptureError(_failure(module, data, first)) from first


def _failure(module: nn.Module, data: Sequence[Any], error: Exception) -> str:
    shape = tuple(data[0].shape)
    text = next(iter(str(error).splitlines()), "") or type(error).__name__
    return f"{type(module).__name__} itself fails on tokens of shape {shape}: {text}"


@contextlib.contextmanager
def plain_loops(module: nn.Module) -> Iterator[int]:
    """Within the context, stacked experts run the forward under its decorators; yields how many."""
    wrapped = [m for m in module.modules() if _has_decorated_loop(m)]
    for m in wrapped:
        m.__dict__["forward"] = inspect.unwrap(type(m).forward).__get__(m)
    try:
        yield len(wrapped)
    finally:
        for m in wrapped:
            del m.__dict__["forward"]


def _has_decorated_loop(module: nn.Module) -> bool:
    stacked = any(p.dim() == 3 for p in module.parameters(recurse=False))
    decorated = hasattr(type(module).forward, "__wrapped__")
    return stacked and decorated and "forward" not in vars(module)


__all__ = ["own_results", "plain_loops"]
