"""Calls that repeat: what one call launched, recorded, and launched again at other addresses.

The launches of a call depend on its sizes alone, so they are recorded once for each size; a later
call puts new addresses in their places and asks the driver for many of them at once. With few
tokens the GPU would be done with a block before Python has asked for the next kernel. Small buffers
that only kernels see share one piece of memory per thread and stream, by the times at which they
live; large ones are taken and given back as in the call that was recorded, so that it needs no
more memory. Results are new tensors.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from moec.runtime.arranged import Call, Give, Item, Launches, Make, Take, arranged
from moec.runtime.driver import ALIGNED, Graph, Launch, TensorMap, prepared_launch
from moec.runtime.recording import (
    Buffer,
    Described,
    NotRepeatable,
    Recording,
    Slot,
    bytes_of,
    packed,
)

_THREAD = threading.local()
# Memory that is kept for buffers, in bytes; a call that needs more of it is not recorded.
MOST_BYTES = 64 << 20
Made = tuple[int, tuple[int, ...] | None, torch.dtype]  # slot, size (none: the tokens'), dtype


@dataclass
class Segment:
    """Launches without an operation between them, and the addresses that each call has anew.

    ``moving`` and ``taken`` are values, place in them, slot, launch, for results and for memory
    that was taken; ``mapped`` are tensor maps, slot, launch.
    """

    graph: Graph
    moving: list[tuple[Any, int, int, int]]
    taken: list[tuple[Any, int, int, int]] = field(default_factory=list)
    mapped: list[tuple[TensorMap, int, int]] = field(default_factory=list)
    dirty: set[int] = field(default_factory=set)

    def run(self, tensors: Sequence[Any]) -> None:
        """Launch, with the addresses of this call."""
        for values, place, slot, launch in self.moving:
            address = tensors[slot].data_ptr()
            if values[place] != address:
                values[place] = address
                self.dirty.add(launch)
        for values, place, slot, launch in self.taken:
            if values[place] != tensors[slot]:
                values[place] = tensors[slot]
                self.dirty.add(launch)
        for tensor_map, slot, launch in self.mapped:
            there = tensors[slot]
            address = there if type(there) is int else there.data_ptr()
            if tensor_map.address != address:
                tensor_map.move(address)
                self.dirty.add(launch)
        self.graph.run(self.dirty)


@dataclass
class Use:
    """Where the address of an input belongs: into values at a place, or into a tensor map."""

    segment: Segment
    launch: int
    values: Any = None
    place: int = 0
    map: TensorMap | None = None

    def move(self, address: int) -> None:
        """Put another address in place."""
        if self.map is not None:
            self.map.move(address)
        else:
            self.values[self.place] = address
        self.segment.dirty.add(self.launch)


@dataclass
class Tape:
    """A recorded call: what it makes, then operations and launches in order, and where addresses
    of its inputs belong.
    """

    outputs: list[int]
    rest: list[None]  # places for what is made in the call
    made: list[Made]
    steps: list[Segment | Item]
    device: torch.device
    dtype: torch.dtype  # of the tokens
    addresses: list[int]
    uses: list[list[Use]]  # of an input
    workspace: torch.Tensor | None = None
    shaped: dict[torch.Size, list[Made]] = field(default_factory=dict)
    computed: frozenset[int] = frozenset()  # outputs that operations make
    late: frozenset[int] = frozenset()  # outputs that are made in their turn
    tokens: torch.Size = field(default_factory=torch.Size)  # of the first input
    operations: bool = False  # whether there are any besides launches
    stream: int = 0
    thread: int = field(default_factory=threading.get_ident)

    def may_be_used(self) -> bool:
        """Whether this thread, on its stream, may use it now."""
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
        for one in sizes:
            if one[0] not in self.late:
                tensors[one[0]] = self._empty(one, inputs)
        try:
            for step in self.steps:
                if type(step) is Segment:
                    step.run(tensors)
                else:
                    self._run(step, tensors, sizes, inputs)  # type: ignore[arg-type]
        except BaseException:
            _give_back(tensors)
            raise
        if shape is not None and self.computed:
            self._reshape(tensors, shape, axes)
        return tuple([tensors[i] for i in self.outputs])

    def _empty(self, made: Made, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        _, size, dtype = made
        if size is None:
            return torch.empty_like(inputs[0])  # what is quickest
        return torch.empty(size, dtype=dtype, device=self.device)

    def _run(
        self,
        step: Item,
        tensors: list[Any],
        sizes: Sequence[Made],
        inputs: Sequence[torch.Tensor],
    ) -> None:
        """What is no launch: memory, and operations of PyTorch."""
        if type(step) is Take:
            tensors[step.slot] = _take(step.size, self.stream)
        elif type(step) is Give:
            if type(tensors[step.slot]) is int:
                _give(tensors[step.slot])
            tensors[step.slot] = None
        elif type(step) is Make:
            (made,) = (m for m in sizes if m[0] == step.slot)
            tensors[step.slot] = self._empty(made, inputs)
        elif type(step) is Call:
            _call(tensors, step.func, step.given, step.places)

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
                for use in self.uses[i]:
                    use.move(address)
        self.addresses = addresses
        return True


def _take(size: int, stream: int) -> int:
    """Memory of PyTorch's allocator, in bytes, without a tensor: its address."""
    address: int = torch._C._cuda_cudaCachingAllocator_raw_alloc(size, stream)
    return address


def _give(address: int) -> None:
    torch._C._cuda_cudaCachingAllocator_raw_delete(address)


def _give_back(tensors: list[Any]) -> None:
    """Give back what was taken in a call that failed."""
    for i, there in enumerate(tensors):
        if type(there) is int:
            _give(there)
            tensors[i] = None


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
    forward: Callable[..., Any], inputs: Sequence[torch.Tensor], large: int | None = None
) -> tuple[tuple[torch.Tensor, ...], Tape | None]:
    """Run a call as always, and the recording of it; ``None`` if it cannot be repeated.

    Buffers of ``large`` bytes and more are taken anew in every call.
    """
    try:
        recording = Recording(inputs)
    except NotRepeatable:
        return forward(*inputs)[0], None
    with recording:
        outputs = forward(*inputs)[0]
    try:
        return outputs, _tape(recording, inputs, outputs, large)
    except NotRepeatable:
        return outputs, None


def _tape(
    recording: Recording,
    inputs: Sequence[torch.Tensor],
    outputs: Sequence[torch.Tensor],
    large: int | None,
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
    taken = [b for b in buffers if large is not None and bytes_of(b) >= large]
    fixed = _buffers_placed(tape, [b for b in buffers if b not in taken])
    tape.late = _large(recording, {slot for slot, _, _ in made if slot in places}, large)
    dropped = _large(recording, _computed(recording) - set(places), large)
    tape.tokens = inputs[0].shape
    _bind(tape, arranged(recording.steps, taken, tape.late, dropped), fixed)
    return tape


def _large(recording: Recording, slots: Collection[int], large: int | None) -> frozenset[int]:
    """The slots whose tensors have so many bytes and more."""
    if large is None:
        return frozenset()
    return frozenset(slot for slot in slots if recording.kept[slot].nbytes >= large)


def _computed(recording: Recording) -> set[int]:
    """The slots of what operations make."""
    return {slot for kind, _, _, more in recording.steps if kind == "call" for slot in more}


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


def _bind(tape: Tape, items: Sequence[Item], fixed: dict[int, int]) -> None:
    """Turn launches into graphs of the driver."""
    tape.operations = any(isinstance(item, Call) for item in items)
    taken = {item.slot for item in items if isinstance(item, Take)}
    for item in items:
        if isinstance(item, Launches):
            tape.steps.append(_segment(tape, item.steps, fixed, taken))
        else:
            tape.steps.append(item)


def _segment(tape: Tape, steps: Sequence[Any], fixed: dict[int, int], taken: set[int]) -> Segment:
    known = dict(enumerate(tape.addresses)) | fixed
    launches: list[Launch] = []
    for _, compiled, grid, given in steps:
        numbers = [_number(g, known) for g in given]
        launch = prepared_launch(compiled, grid, numbers)
        if launch is None:
            raise NotRepeatable("a kernel whose launch is more than addresses and numbers")
        launches.append(launch)
    segment = Segment(Graph(launches, tape.stream), [])
    for at, (launch, (_, _, _, given)) in enumerate(zip(launches, steps, strict=True)):
        for i, one in enumerate(given):
            if isinstance(one, Slot | Described) and one.place not in fixed:
                _connect(tape, segment, launch, at, i, one.place, taken)
    return segment


def _number(given: Any, known: dict[int, int]) -> Any:
    """What a launch is prepared with: an address that is not known yet is any that is aligned."""
    if type(given) is Slot:
        return known.get(given.place, 0)
    if type(given) is Described:
        return given.descriptor, known.get(given.place, given.descriptor.base.data_ptr())
    return given


def _connect(
    tape: Tape, segment: Segment, launch: Launch, at: int, i: int, slot: int, taken: set[int]
) -> None:
    """Say where the address of a slot belongs, which argument ``i`` of a launch is."""
    if i in launch.maps:
        tensor_map = launch.maps[i]
        if slot < len(tape.addresses):
            tape.uses[slot].append(Use(segment, at, map=tensor_map))
        else:
            segment.mapped.append((tensor_map, slot, at))
    elif i in launch.places:
        place = launch.places[i]
        if slot < len(tape.addresses):
            tape.uses[slot].append(Use(segment, at, launch.values, place))
        else:
            moving = segment.taken if slot in taken else segment.moving
            moving.append((launch.values, place, slot, at))


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


__all__ = ["Tape", "record"]
