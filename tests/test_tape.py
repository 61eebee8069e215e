"""Recording calls: what may be repeated, where buffers go, how arguments are laid out."""

import ctypes
import random
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from moec.runtime.driver import prepared_launch
from moec.runtime.recording import Buffer, bytes_of, packed
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
