"""Recording calls: what may be repeated, where buffers go, how arguments are laid out."""

import ctypes
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moec.runtime import driver
from moec.runtime.arranged import Call, Give, Launches, Take, arranged
from moec.runtime.driver import prepared_launch
from moec.runtime.recording import Buffer, Slot, bytes_of, packed
from moec.runtime.tape import record


def test_operations_are_made_again() -> None:
    def forward(x: torch.Tensor, w: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], tuple[()]]:
        first, second = torch.split(x @ w.t(), 1, dim=-1)
        return (torch.cat([first, second * 2]), first), ()

    x, w = torch.randn(3, 4), torch.randn(2, 4)
    _, tape = record(forward, [x, w])
    assert tape is not None
    y = torch.randn(3, 4)
    found, expected = tape([y, w]), forward(y, w)[0]
    assert found is not None
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


CONSTANT = torch.ones(())
READS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "item": lambda x: x * x.sum().item(),
    "bool": lambda x: x if bool((x > 0).all()) else -x,
    "list": lambda x: x * len(x[0].tolist()),
    "constant": lambda x: x + CONSTANT,
}


@pytest.mark.parametrize("name", READS)
def test_a_call_that_reads_numbers_is_not_recorded(name: str) -> None:
    x = torch.randn(2, 3)
    outputs, tape = record(lambda t: ((READS[name](t),), ()), [x])
    assert tape is None
    assert torch.equal(outputs[0], READS[name](x))


def test_an_input_passed_twice_and_one_without_elements_are_not_recorded() -> None:
    x = torch.randn(2, 2)
    assert record(lambda a, b: ((a + b,), ()), [x, x])[1] is None
    assert record(lambda a: ((a + 1,), ()), [x[:0]])[1] is None


@pytest.mark.parametrize("seed", range(20))
def test_buffers_that_live_at_one_time_do_not_overlap(seed: int) -> None:
    r = random.Random(seed)
    buffers = []
    for slot in range(r.randint(1, 30)):
        first = r.randint(0, 20)
        tensor = torch.empty(r.randint(0, 3000))
        buffers.append(Buffer(tensor, slot, first, first + r.randint(0, 6)))
    total = packed(buffers)
    for i, a in enumerate(buffers):
        assert a.offset + bytes_of(a) <= total
        for b in buffers[:i]:
            apart = a.last < b.first or b.last < a.first
            below = a.offset + bytes_of(a) <= b.offset or b.offset + bytes_of(b) <= a.offset
            assert apart or below


def compiled(signature: dict[str, str], **metadata: int) -> SimpleNamespace:
    """What Triton gives for a kernel, as far as a launch reads it."""
    facts = {"num_warps": 4, "num_ctas": 1, "shared": 2048} | metadata
    return SimpleNamespace(
        src=SimpleNamespace(signature=signature), metadata=SimpleNamespace(**facts), function=77
    )


def test_arguments_lie_in_memory_as_the_driver_reads_them() -> None:
    kernel = compiled({"x": "*bf16", "n": "i32", "E": "constexpr", "y": "*fp32"})
    launch = prepared_launch(kernel, (5, 2), [1 << 40, -3, 64, 1 << 41])
    assert launch is not None
    assert launch.places == {0: 0, 1: 1, 3: 2}
    assert list(launch.node.grid) == [5, 2, 1]
    assert list(launch.node.block) == [128, 1, 1]
    assert launch.node.function == 77 and launch.node.shared == 2048
    pointers = (ctypes.c_uint64 * 3).from_address(launch.node.arguments)
    assert ctypes.c_uint64.from_address(pointers[0]).value == 1 << 40
    assert ctypes.c_int32.from_address(pointers[1]).value == -3
    launch.values[2] = 1 << 42
    assert ctypes.c_uint64.from_address(pointers[2]).value == 1 << 42


@pytest.mark.parametrize(
    "kernel",
    [
        compiled({"x": "fp32"}),
        compiled({"x": "tensordesc<bf16[1, 2]>"}),
        compiled({"x": "*bf16"}, global_scratch_size=8),
        compiled({"x": "*bf16"}, num_ctas=2),
        compiled({"x": "*bf16", "y": "*bf16"}),
    ],
)
def test_a_launch_that_needs_more_is_left_to_triton(kernel: SimpleNamespace) -> None:
    assert prepared_launch(kernel, (1,), [16]) is None


def random_call(r: random.Random) -> tuple[list[Any], list[Buffer], int]:
    """Steps of a call with buffers, and the most that they hold at a time."""
    steps: list[tuple[Any, ...]] = []
    live: list[Buffer] = []
    buffers: list[Buffer] = []
    for slot in range(100, 100 + r.randint(1, 12)):
        buffer = Buffer(torch.empty(r.randint(1, 4000)), slot, len(steps), len(steps))
        buffers.append(buffer)
        live.append(buffer)
        steps.append(("empty", slot, (), {}))
        for _ in range(r.randint(0, 3)):
            used = r.sample(live, r.randint(1, len(live)))
            places = [Slot(b.slot) for b in used]
            for b in used:
                b.last = len(steps)
            step = ("call", print, [places, {}], [len(steps)])
            steps.append(step if r.random() < 0.2 else ("launch", "kernel", (1,), places))
        live = [b for b in live if r.random() < 0.6]
    held = [
        sum(bytes_of(b) for b in buffers if b.first <= now <= b.last) for now in range(len(steps))
    ]
    return steps, buffers, max(held)


@pytest.mark.parametrize("seed", range(40))
def test_memory_is_taken_as_in_the_call_that_was_recorded(seed: int) -> None:
    steps, buffers, most = random_call(random.Random(seed))
    items = arranged(steps, buffers)
    held: dict[int, int] = {}
    peak, done = 0, list[Any]()
    for item in items:
        if isinstance(item, Take):
            held[item.slot] = item.size
        elif isinstance(item, Give):
            held.pop(item.slot, None)
        elif isinstance(item, Launches):
            done += item.steps
            assert all(s.place in held for step in item.steps for s in step[3])
        elif isinstance(item, Call):
            done.append(("call", item.func, item.given, item.places))
            assert all(s.place in held for s in item.given[0])
        peak = max(peak, sum(held.values()))
    assert done == [s for s in steps if s[0] != "empty"]
    assert peak == most and not held


def test_launches_stay_together_until_memory_that_is_over_is_needed() -> None:
    def launch(*slots: int) -> tuple[Any, ...]:
        return ("launch", "kernel", (1,), [Slot(s) for s in slots])

    def empty(slot: int) -> tuple[Any, ...]:
        return ("empty", slot, (), {})

    steps = [empty(1), launch(0, 1), empty(2), launch(1, 2), empty(3), launch(2, 3)]
    buffers = [Buffer(torch.empty(64), s, 0, 0) for s in (1, 2)]
    items = arranged(steps, buffers, late={3})
    kinds = [(type(i).__name__, getattr(i, "slot", None)) for i in items]
    assert kinds == [
        ("Take", 1),
        ("Take", 2),
        ("Launches", None),
        ("Give", 1),
        ("Make", 3),
        ("Launches", None),
        ("Give", 2),
    ]


def test_a_tensor_map_lies_where_the_kernel_expects_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, tuple[Any, ...]]] = []

    def function(name: str) -> Callable[..., int]:
        def called(*given: Any) -> int:
            asked.append((name, given))
            return 0

        return called

    monkeypatch.setattr(driver, "_function", function)
    kernel = compiled({"n": "i32", "x": "tensordesc<bf16[8, 64]>", "y": "*bf16"})
    layout = {"swizzle": 3, "elem_size": 2, "block_size": [8, 64], "fp4_padded": False}
    kernel.metadata.tensordesc_meta = [layout]
    base = SimpleNamespace(dtype=torch.bfloat16)
    descriptor = SimpleNamespace(base=base, shape=[100, 256], strides=[256, 1])
    launch = prepared_launch(kernel, (5,), [7, (descriptor, 1 << 40), 1 << 41])
    assert launch is not None
    ((name, given),) = asked
    assert name == "cuTensorMapEncodeTiled" and given[3].value == 1 << 40
    assert list(given[4]) == [256, 100] and given[5][0] == 512 and list(given[6]) == [64, 8]
    pointers = (ctypes.c_uint64 * 7).from_address(launch.node.arguments)
    assert pointers[1] == launch.maps[1].start and pointers[1] % 64 == 0
    values = [ctypes.c_uint64.from_address(p).value for p in (pointers[0], *pointers[2:7])]
    assert values == [7, 100, 256, 256, 1, 1 << 41], "shape and strides follow the map"
    assert launch.places == {0: 0, 2: 6}
    launch.maps[1].move(1 << 42)
    assert asked[-1][0] == "cuTensorMapReplaceAddress" and launch.maps[1].address == 1 << 42
