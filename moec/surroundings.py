"""What surrounds a call: transforms, tracers, kinds of tensors that compiled code cannot take."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch.autograd import forward_ad

T = TypeVar("T")
_THREAD = threading.local()
NO_WEIGHTS = "it has no parameters any more: its weights were quantised or packed away"
_MODES = torch._C._TorchDispatchModeKey
_TRACERS = (_MODES.PROXY, _MODES.FAKE, _MODES.FUNCTIONAL)


def is_transformed() -> bool:
    """Whether the call is under ``torch.func`` (grad, vmap, jvp ...) or forward-mode autograd.

    Those ask each operation for its own rule, so a module's own code has to run.
    """
    stack: object = torch._C._functorch.peek_interpreter_stack()  # None outside transforms
    return stack is not None or forward_ad._current_level >= 0


def is_traced() -> bool:
    """Whether operations are being written down (``make_fx``) or run on fake tensors.

    Then a region must be one opaque op: what its code does depends on the routing of this call.
    """
    if torch._C._len_torch_dispatch_stack() == 0:
        return False
    return any(torch._C._get_dispatch_mode(key) is not None for key in _TRACERS)


def odd_tensor(tensors: Iterable[torch.Tensor], *, fake: bool = False) -> torch.Tensor | None:
    """The first tensor that is not plain memory: a sharded or a quantised one, say.

    ``fake`` says that a tracer's stand-ins for plain memory will do.
    """
    return next((t for t in tensors if not (_is_plain(t) or (fake and _is_fake(t)))), None)


def _is_plain(tensor: torch.Tensor) -> bool:
    cls = type(tensor)
    own = cls.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
    return tensor.layout is torch.strided and not tensor.is_quantized and not own


def _is_fake(tensor: torch.Tensor) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor)


def odd_reason(tensor: torch.Tensor) -> str:
    """Why weights of a kind leave a region as it was, and what helps."""
    kind = "quantised" if tensor.is_quantized else type(tensor).__name__
    if kind == "DTensor":
        return (
            "its weights are DTensors here: sharded. Call the model that fully_shard was given, "
            "which gathers them for the call, not the block alone"
        )
    return f"its weights are {kind} tensors, which compiled code cannot read; its own code runs"


def isolated(function: Callable[[], T], device: torch.device) -> T:
    """The result of a function that sees nothing of the caller's surroundings.

    What code is captured from must not depend on where its first call happens to be: inside
    ``no_grad``, a checkpoint (whose hooks count saved tensors), a dispatch mode, inference mode.
    All of these belong to a thread, so the function runs in one of its own, on the caller's stream;
    in the same one where it is isolated already.
    """
    if getattr(_THREAD, "is_isolated", False):
        return function()
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        _THREAD.is_isolated = True
        try:
            with torch.cuda.stream(stream):  # with None it does nothing
                results.append(function())
        except BaseException as error:  # raised again in the caller's thread
            errors.append(error)

    thread = threading.Thread(target=run, name="moec")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


__all__ = ["NO_WEIGHTS", "is_traced", "is_transformed", "isolated", "odd_reason", "odd_tensor"]
