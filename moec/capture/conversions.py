"""Blocks that convert a submodule in forward (``self.gate = self.gate.to(dtype)``)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from moec.errors import CaptureError


@contextlib.contextmanager
def idle_conversions(block: nn.Module) -> Iterator[None]:
    """Within the context, conversions of modules inside a block to the dtype and device that they
    have do nothing, so that tracers can pass them; :class:`CaptureError` for one that does
    something.

    ``Module.to`` sets every parameter again even where nothing changes, which tracers refuse.
    """
    changed = [m for m in block.modules() if m is not block and "to" not in vars(m)]
    for module in changed:
        module.__dict__["to"] = _conversion(module)
    try:
        yield
    finally:
        for module in changed:
            del module.__dict__["to"]


def _conversion(module: nn.Module) -> Callable[..., nn.Module]:
    def to(*args: Any, **kwargs: Any) -> nn.Module:
        parsed: tuple[Any, ...] = torch._C._nn._parse_to(*args, **kwargs)
        device, dtype, _, memory_format = parsed
        for tensor in (*module.parameters(), *module.buffers()):
            other_dtype = dtype not in (None, tensor.dtype) and tensor.is_floating_point()
            other_device = device is not None and device.type != tensor.device.type
            if other_dtype or other_device or memory_format is not None:
                raise CaptureError(
                    f"forward converts {type(module).__name__} to {args or kwargs}; "
                    "convert it before the model is compiled"
                )
        return module

    return to


__all__ = ["idle_conversions"]
