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

from moec.runtime.driver import ALIGNED, Graph, Launch, prepared_launch
from moec.runtime.recording import Buffer, NotRepeatable, Recording, Slot, Step, packed

_THREAD = threading.local()
# Memory that is kept for buffers, in bytes; a call that needs more is not recorded.
MOST_BYTES = 64 << 20
Made = tuple[int, tuple[int, ...] | None, torch.dtype]  # slot, size (none: the tokens'), dtype


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
        self.graph.run(self.dirty)


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
    tokens: torch.Size = field(default_factory=torch.Size)  # of the first input
    operations: bool = False  # whether there are any besides launches
    stream: int = 0
    thread: int = field(default_factory=threading.get_ident)

    def may_be_used(self) -> bool:
        """Whether this thread, on its stream, may use it now; see :func:`may_repeat`."""
        index = self.device.index
        return (
            threading.get_ident() == self.thread
            and torch._C._cuda_getDevice() == index
            and torch._C._cuda_getCurrentRawStream(index) == self.stream
            and not torch._C._cuda_isCurrentStreamCapturing()
        )

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
        if self.operations and inputs[0].shape != self.tokens:
            tensors[0] = inputs[0].view(self.tokens)
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
    if device.type == "cuda":
        tape.stream = torch._C._cuda_getCurrentRawStream(device.index)
    tape.computed = frozenset(places) - {slot for slot, _, _ in made}
    fixed = _buffers_placed(tape, buffers)
    tape.tokens = inputs[0].shape
    _bind(tape, [s for s in recording.steps if s[0] != "empty"], fixed)
    return tape


def _buffers_placed(tape: Tape, buffers: Sequence[Buffer]) -> dict[int, int]:
    """The addresses of buffers, by slot."""
    size = packed(buffers)
    if size > MOST_BYTES:
        raise NotRepeatable("buffers that are too large to keep")
    if not buffers:
        return {}
    tape.workspace = _workspace(tape.device, tape.stream, size)
    base = tape.workspace.data_ptr()
    return {b.slot: base + b.offset for b in buffers}


def _bind(tape: Tape, steps: Sequence[Step], fixed: dict[int, int]) -> None:
    """Turn launches into graphs of the driver, each as long as no operation comes between."""
    tape.operations = any(step[0] == "call" for step in steps)
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
    segment = Segment(Graph(launches, tape.stream), [])
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


__all__ = ["Tape", "Tapes", "may_repeat", "record"]
