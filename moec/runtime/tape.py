"""Calls that repeat: what one call launched, recorded, and launched again at other addresses.

For few tokens a GPU is done with a block before Python has asked for the next kernel. The launches
of a call depend on its sizes alone, so they are recorded once for each size; a later call puts new
addresses in their places and asks the driver for all of them at once. Buffers that only kernels see
share one piece of memory per thread and stream, by the times at which they live; results are new
tensors.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from moec.runtime.driver import ALIGNED, Graph, Launch, prepared_launch

_THREAD = threading.local()
_ALIGN = 256
# Memory that is kept for buffers, in bytes; a call that needs more is not recorded.
MOST_BYTES = 64 << 20
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


@dataclass
class _Buffer:
    """A tensor made by ``torch.empty``, and when kernels use it."""

    tensor: torch.Tensor
    slot: int
    first: int
    last: int
    is_private: bool = True
    offset: int = 0


Step = tuple[str, Any, Any, Any]
Made = tuple[int, tuple[int, ...] | None, torch.dtype]  # slot, size (none: the tokens'), dtype


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
        self.buffers: dict[int, _Buffer] = {}
        self.steps: list[Step] = []
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
            self.buffers[slot] = _Buffer(result, slot, now, now)
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

    def launch(self, compiled: Any, grid: Sequence[int], arguments: Sequence[Any]) -> None:
        """Note a kernel's launch; ``arguments`` are all of them, constants too."""
        given = self._tensors_replaced(list(arguments), shared=False)
        self.steps.append(("launch", compiled, tuple(grid), given))

    def interpreted(
        self, launch: Callable[..., None], arguments: Sequence[Any], options: dict[str, Any]
    ) -> None:
        """Launch a kernel in Triton's interpreter, and note it as an operation."""
        given = self._tensors_replaced([arguments, options], shared=True)
        self.steps.append(("call", launch, given, ()))
        with torch._C.DisableTorchFunction():
            launch(*arguments, **options)


def current() -> Recording | None:
    """The recording that is going on in this thread."""
    return getattr(_THREAD, "recording", None)


@dataclass
class Segment:
    """Launches without an operation between them, and the addresses that each call has anew."""

    graph: Graph
    moving: list[tuple[Any, int, int, int]]  # values, place in them, slot, launch
    dirty: set[int] = field(default_factory=set)

    def run(self, tensors: Sequence[Any]) -> None:
        """Launch, with the addresses of this call."""
        for values, place, slot, launch in self.moving:
            address = tensors[slot].data_ptr()
            if values[place] != address:
                values[place] = address
                self.dirty.add(launch)
        if self.dirty:
            for launch in self.dirty:
                self.graph.change(launch)
            self.dirty.clear()
        self.graph.run()


@dataclass
class Tape:
    """A recorded call: what it makes, then operations and launches in order, and where addresses
    of its inputs belong.
    """

    outputs: list[int]
    rest: list[None]  # places for what is made in the call
    made: list[Made]
    steps: list[Segment | tuple[Any, Any, Any]]
    device: torch.device
    dtype: torch.dtype  # of the tokens
    addresses: list[int]
    uses: list[list[tuple[Segment, Any, int, int]]]  # of an input: values, place, launch
    workspace: torch.Tensor | None = None
    shaped: dict[torch.Size, list[Made]] = field(default_factory=dict)
    computed: frozenset[int] = frozenset()  # outputs that operations make

    def __call__(
        self,
        inputs: Sequence[torch.Tensor],
        shape: torch.Size | None = None,
        axes: Sequence[int | None] = (),
    ) -> tuple[torch.Tensor, ...] | None:
        """The outputs for inputs of the recorded sizes; ``None`` where the recording does not fit
        their addresses.

        Where ``axes`` has a number for an output, its axes are the leading ones of ``shape``, the
        tokens', and so many of its last.
        """
        addresses = [t.data_ptr() for t in inputs]
        if addresses != self.addresses and not self._move(addresses):
            return None
        tensors: list[Any] = [*inputs, *self.rest]
        sizes = self._sizes(shape, axes) if shape is not None else self.made
        for slot, size, dtype in sizes:
            if size is None:
                tensors[slot] = torch.empty_like(inputs[0])  # what is quickest
            else:
                tensors[slot] = torch.empty(size, dtype=dtype, device=self.device)
        for step in self.steps:
            if type(step) is Segment:
                step.run(tensors)
            else:
                _call(tensors, *step)  # type: ignore[misc]
        if shape is not None and self.computed:
            self._reshape(tensors, shape, axes)
        return tuple([tensors[i] for i in self.outputs])

    def _sizes(self, shape: torch.Size, axes: Sequence[int | None]) -> list[Made]:
        """What to make, outputs in the sizes that they have outside."""
        known = self.shaped.get(shape)
        if known is None:
            count = dict(zip(self.outputs, axes, strict=False))
            known = []
            for slot, size, dtype in self.made:
                outside = _outside(shape, size or (), count.get(slot))
                like = outside == shape and dtype is self.dtype
                known.append((slot, None if like else outside, dtype))
            self.shaped[shape] = known
        return known

    def _reshape(self, tensors: list[Any], shape: torch.Size, axes: Sequence[int | None]) -> None:
        """Give outputs that an operation made the sizes that they have outside."""
        for slot, count in zip(self.outputs, axes, strict=False):
            if slot in self.computed and count is not None:
                tensors[slot] = tensors[slot].reshape(_outside(shape, tensors[slot].shape, count))

    def _move(self, addresses: list[int]) -> bool:
        """Put other addresses of inputs in place, if they are as the kernels assume."""
        if any(not a or a % ALIGNED for a in addresses):
            return False
        for i, address in enumerate(addresses):
            if address != self.addresses[i]:
                for segment, values, place, launch in self.uses[i]:
                    values[place] = address
                    segment.dirty.add(launch)
        self.addresses = addresses
        return True


def _outside(shape: torch.Size, size: Sequence[int], count: int | None) -> tuple[int, ...]:
    """The size of an output for tokens of a shape; ``count`` of its axes are not the tokens'."""
    return tuple(size) if count is None else (*shape[:-1], *size[len(size) - count :])


def _call(tensors: list[Any], func: Any, given: Any, places: Sequence[int]) -> None:
    args, kwargs = given
    if not places:
        func(*_filled(args, tensors), **kwargs)
        return
    result = func(*_filled(args, tensors), **{k: _filled(v, tensors) for k, v in kwargs.items()})
    if len(places) == 1 and isinstance(result, torch.Tensor):
        tensors[places[0]] = result
        return
    for place, one in zip(places, result, strict=True):
        tensors[place] = one


def _filled(value: Any, tensors: Sequence[Any]) -> Any:
    """A structure of arguments with the tensors of this call."""
    if type(value) is Slot:
        return tensors[value.place]
    if type(value) in (list, tuple):
        return type(value)([_filled(v, tensors) for v in value])
    return value


def record(
    forward: Callable[..., Any], inputs: Sequence[torch.Tensor]
) -> tuple[tuple[torch.Tensor, ...], Tape | None]:
    """Run a call as always, and the recording of it; ``None`` if it cannot be repeated."""
    try:
        recording = Recording(inputs)
    except NotRepeatable:
        return forward(*inputs)[0], None
    with recording:
        outputs = forward(*inputs)[0]
    try:
        return outputs, _tape(recording, inputs, outputs)
    except NotRepeatable:
        return outputs, None


def _tape(
    recording: Recording, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]
) -> Tape:
    if recording.reason:
        raise NotRepeatable(recording.reason)
    if any(id(o) not in recording.slots for o in outputs):
        raise NotRepeatable("an output that was not made in the call")
    places = [recording.slots[id(o)] for o in outputs]
    for place in places:
        if place in recording.buffers:
            recording.buffers[place].is_private = False
    device = inputs[0].device
    addresses = [t.data_ptr() for t in inputs]
    if any(not t.numel() or a % ALIGNED for t, a in zip(inputs, addresses, strict=True)):
        raise NotRepeatable("an input that is empty or not aligned")
    buffers = [b for b in recording.buffers.values() if b.is_private and device.type == "cuda"]
    private = {b.slot for b in buffers}
    made: list[Made] = [
        (slot, tuple(b.tensor.shape), b.tensor.dtype)
        for slot, b in recording.buffers.items()
        if slot not in private
    ]
    rest = [None] * (recording.count - len(inputs))
    tape = Tape(places, rest, made, [], device, inputs[0].dtype, addresses, [[] for _ in inputs])
    tape.computed = frozenset(places) - {slot for slot, _, _ in made}
    fixed = _buffers_placed(tape, buffers)
    _bind(tape, [s for s in recording.steps if s[0] != "empty"], fixed)
    return tape


def _buffers_placed(tape: Tape, buffers: Sequence[_Buffer]) -> dict[int, int]:
    """The addresses of buffers, by slot."""
    size = _packed(buffers)
    if size > MOST_BYTES:
        raise NotRepeatable("buffers that are too large to keep")
    if not buffers:
        return {}
    stream = torch._C._cuda_getCurrentRawStream(tape.device.index)
    tape.workspace = _workspace(tape.device, stream, size)
    base = tape.workspace.data_ptr()
    return {b.slot: base + b.offset for b in buffers}


def _packed(buffers: Sequence[_Buffer]) -> int:
    """Give each buffer a place such that those that live at one time do not overlap; the size."""
    placed: list[_Buffer] = []
    total = 0
    for buffer in sorted(buffers, key=_bytes, reverse=True):
        near = [b for b in placed if b.first <= buffer.last and buffer.first <= b.last]
        offset = 0
        for other in sorted(near, key=lambda b: b.offset):
            if offset + _bytes(buffer) <= other.offset:
                break
            offset = max(offset, other.offset + _bytes(other))
        buffer.offset = offset
        placed.append(buffer)
        total = max(total, offset + _bytes(buffer))
    return total


def _bytes(buffer: _Buffer) -> int:
    size = buffer.tensor.numel() * buffer.tensor.element_size()
    return -(-max(size, 1) // _ALIGN) * _ALIGN


def _bind(tape: Tape, steps: Sequence[Step], fixed: dict[int, int]) -> None:
    """Turn launches into graphs of the driver, each as long as no operation comes between."""
    for is_launch, group in itertools.groupby(steps, lambda s: s[0] == "launch"):
        if is_launch:
            tape.steps.append(_segment(tape, list(group), fixed))
        else:
            tape.steps += [(func, given, places) for _, func, given, places in group]


def _segment(tape: Tape, steps: Sequence[Step], fixed: dict[int, int]) -> Segment:
    known = dict(enumerate(tape.addresses)) | fixed
    launches: list[Launch] = []
    for _, compiled, grid, given in steps:
        numbers = [known.get(g.place, 0) if type(g) is Slot else g for g in given]
        launch = prepared_launch(compiled, grid, numbers)
        if launch is None:
            raise NotRepeatable("a kernel whose launch is more than addresses and numbers")
        launches.append(launch)
    stream = torch._C._cuda_getCurrentRawStream(tape.device.index)
    segment = Segment(Graph(launches, stream), [])
    for at, (launch, (_, _, _, given)) in enumerate(zip(launches, steps, strict=True)):
        slots = {i: g.place for i, g in enumerate(given) if type(g) is Slot}
        for i, slot in slots.items():
            if i not in launch.places or slot in fixed:
                continue
            place = launch.places[i]
            if slot < len(tape.addresses):
                tape.uses[slot].append((segment, launch.values, place, at))
            else:
                segment.moving.append((launch.values, place, slot, at))
    return segment


def _workspace(device: torch.device, stream: int, size: int) -> torch.Tensor:
    """The memory for buffers of one thread and stream; it only grows."""
    kept: dict[Any, torch.Tensor] = getattr(_THREAD, "workspaces", None) or {}
    _THREAD.workspaces = kept
    known = kept.get((device, stream))
    if known is None or known.numel() < size:
        # the one before stays with the tapes that were bound to it
        known = torch.empty(max(size, 1 << 20), dtype=torch.uint8, device=device)
        kept[device, stream] = known
    return known


class Tapes:
    """The recordings of one artifact's calls, by sizes and stream; each thread has its own."""

    def __init__(self, varying: Sequence[int], most: int = 256) -> None:
        """``varying`` are the inputs whose sizes differ between calls."""
        self.varying, self.most = tuple(varying), most
        self._kept = threading.local()

    def call(
        self, forward: Callable[..., Any], inputs: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, ...] | None:
        """The outputs of a call on a GPU, by its recording or by one made now; ``None`` if it has
        to be made as always.
        """
        x = inputs[0]
        if not may_repeat(x):
            return None
        kept: dict[Any, Tape | None] = self._kept.__dict__
        stream = torch._C._cuda_getCurrentRawStream(x.get_device())
        key = stream, *[tuple(inputs[i].shape) for i in self.varying]
        if key in kept:
            tape = kept[key]
            return None if tape is None else tape(inputs)
        if len(kept) >= self.most:
            kept.clear()
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
            outputs, kept[key] = record(forward, inputs)
        return outputs

    def known(self, x: torch.Tensor, size: tuple[int, ...]) -> Tape | None:
        """The recording of calls with tokens of a size alone, if there is one that may be used."""
        if not may_repeat(x):
            return None
        stream = torch._C._cuda_getCurrentRawStream(x.get_device())
        kept: dict[Any, Tape | None] = self._kept.__dict__
        return kept.get((stream, size))


def may_repeat(x: torch.Tensor) -> bool:
    """Whether a call is on the current GPU, and not part of a CUDA graph: that is replayed on any
    stream, so its buffers must be its own.
    """
    return (
        x.is_cuda
        and torch._C._cuda_getDevice() == x.get_device()
        and not torch._C._cuda_isCurrentStreamCapturing()
        and torch._C._len_torch_function_stack() == 0
    )


__all__ = ["NotRepeatable", "Recording", "Tape", "Tapes", "current", "may_repeat", "record"]
