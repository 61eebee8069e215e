"""What one call does: operations and launches of kernels, in order, noted as they happen."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_THREAD = threading.local()
_ALIGN = 256
# What may be asked of a tensor without reading its numbers.
_ASKED = {
    "data_ptr",
    "dim",
    "size",
    "stride",
    "numel",
    "element_size",
    "is_contiguous",
    "is_floating_point",
}


class NotRepeatable(Exception):
    """A call does something that a recording cannot hold."""


@dataclass(frozen=True)
class Slot:
    """Where a tensor comes from: the place in the list of a call's tensors."""

    place: int


@dataclass(frozen=True)
class Described:
    """A descriptor of the tensor at a place: what the copy engine is told of it."""

    place: int
    descriptor: Any


@dataclass(eq=False)
class Buffer:
    """A tensor made by ``torch.empty``, and when kernels use it."""

    tensor: torch.Tensor
    slot: int
    first: int
    last: int
    is_private: bool = True
    offset: int = 0


Step = tuple[str, Any, Any, Any]


class Recording(TorchFunctionMode):
    """Notes the operations and launches of one call, which happen as always."""

    def __init__(self, inputs: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.slots: dict[int, int] = {id(t): i for i, t in enumerate(inputs)}
        self.inputs = len(self.slots)
        if self.inputs != len(inputs):
            raise NotRepeatable("an input that is passed twice")
        self.count = len(inputs)
        self.kept: list[torch.Tensor] = list(inputs)
        self.buffers: dict[int, Buffer] = {}
        self.steps: list[Step] = []
        self.descriptors: dict[int, tuple[Any, torch.Tensor]] = {}
        self.reason = ""

    def __enter__(self) -> Recording:
        _THREAD.recording = self
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        _THREAD.recording = None
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if isinstance(result, torch.Tensor):
            self._note(func, args, kwargs, result)
        elif isinstance(result, tuple | list) and any(isinstance(r, torch.Tensor) for r in result):
            self._note(func, args, kwargs, result)
        elif getattr(func, "__name__", "") not in {"__get__", *_ASKED}:
            self.reason = self.reason or f"{func} reads a tensor's numbers"
        return result

    def _note(self, func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        if func is torch.empty:
            slot = self._new(result)
            now = len(self.steps)
            self.buffers[slot] = Buffer(result, slot, now, now)
            self.steps.append(("empty", slot, args, kwargs))
            return
        given = self._tensors_replaced([args, kwargs], shared=True)
        results = [result] if isinstance(result, torch.Tensor) else list(result)
        known = [self.slots.get(id(r)) for r in results if isinstance(r, torch.Tensor)]
        places = [self._new(r) if k is None else k for r, k in zip(results, known, strict=True)]
        self.steps.append(("call", func, given, places))

    def _new(self, tensor: torch.Tensor) -> int:
        self.slots[id(tensor)] = self.count
        self.kept.append(tensor)
        self.count += 1
        return self.count - 1

    def _tensors_replaced(self, value: Any, shared: bool) -> Any:
        """A structure of arguments with slots for tensors."""
        if isinstance(value, torch.Tensor):
            return Slot(self._slot(value, shared))
        if id(value) in self.descriptors:
            return Described(self._slot(self.descriptors[id(value)][1], shared), value)
        if isinstance(value, list | tuple) and type(value) in (list, tuple):
            return type(value)(self._tensors_replaced(v, shared) for v in value)
        if isinstance(value, dict):
            return {k: self._tensors_replaced(v, shared) for k, v in value.items()}
        return value

    def _slot(self, tensor: torch.Tensor, shared: bool) -> int:
        slot = self.slots.get(id(tensor))
        if slot is None:
            self.reason = self.reason or "a tensor that is neither an input nor made in the call"
            return 0
        if slot in self.buffers:
            self.buffers[slot].last = len(self.steps)
            self.buffers[slot].is_private &= not shared
        return slot

    def describe(self, descriptor: Any, tensor: torch.Tensor) -> None:
        """Note of which tensor a kernel gets a descriptor."""
        self.descriptors[id(descriptor)] = descriptor, tensor

    def launch(self, compiled: Any, grid: Sequence[int], arguments: Sequence[Any]) -> None:
        """Note a kernel's launch; ``arguments`` are all of them, constants too."""
        given = self._tensors_replaced(list(arguments), shared=False)
        self.steps.append(("launch", compiled, tuple(grid), given))

    def interpreted(
        self, launch: Callable[..., None], arguments: Sequence[Any], options: dict[str, Any]
    ) -> None:
        """Launch a kernel in Triton's interpreter, and note it as an operation."""
        if any(id(a) in self.descriptors for a in arguments):
            self.reason = self.reason or "a descriptor of a tensor in the interpreter"
        given = self._tensors_replaced([arguments, options], shared=True)
        self.steps.append(("call", launch, given, ()))
        with torch._C.DisableTorchFunction():
            launch(*arguments, **options)


def current() -> Recording | None:
    """The recording that is going on in this thread."""
    return getattr(_THREAD, "recording", None)


def packed(buffers: Sequence[Buffer]) -> int:
    """Give each buffer a place such that those that live at one time do not overlap; the size."""
    placed: list[Buffer] = []
    total = 0
    for buffer in sorted(buffers, key=bytes_of, reverse=True):
        near = [b for b in placed if b.first <= buffer.last and buffer.first <= b.last]
        offset = 0
        for other in sorted(near, key=lambda b: b.offset):
            if offset + bytes_of(buffer) <= other.offset:
                break
            offset = max(offset, other.offset + bytes_of(other))
        buffer.offset = offset
        placed.append(buffer)
        total = max(total, offset + bytes_of(buffer))
    return total


def bytes_of(buffer: Buffer) -> int:
    size = buffer.tensor.numel() * buffer.tensor.element_size()
    return -(-max(size, 1) // _ALIGN) * _ALIGN


__all__ = ["Buffer", "Described", "NotRepeatable", "Recording", "Slot", "Step", "current", "packed"]
