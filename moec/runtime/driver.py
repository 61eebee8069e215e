"""Launching compiled kernels through the CUDA driver, with their arguments already in place.

Triton's launch reads, checks and packs every argument anew. Here they lie in memory as the driver
wants them, and the launches of a call are one graph: a later call changes the addresses that moved
and asks for all kernels at once. The graph is built node by node; nothing is captured from a
stream, so other threads are not disturbed.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

# What Triton may assume of an address that it was compiled for.
ALIGNED = 16
# Memory for scratch and for profiling, which these kernels do not use: further arguments.
_EXTRA = 4
_INTEGERS = {"i1", "i8", "i16", "i32", "i64"}
# CUtensorMap, CUtensorMapDataType and CU_TENSOR_MAP_L2_PROMOTION_L2_128B of the driver
_MAP_BYTES, _MAP_ALIGNED = 128, 64
_MAP_KINDS = {torch.float16: 6, torch.float32: 7, torch.float64: 8, torch.bfloat16: 9}
_MAP_KINDS |= {torch.uint8: 0, torch.int32: 4, torch.int64: 5}
_L2_128_BYTES = 2
_LAYOUT = {"swizzle", "elem_size", "block_size"}  # what is read of Triton's


class _Node(ctypes.Structure):
    """``CUDA_KERNEL_NODE_PARAMS`` of the driver's first version of it."""

    _fields_ = (
        ("function", ctypes.c_void_p),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("arguments", ctypes.c_void_p),
        ("extra", ctypes.c_void_p),
    )


class TensorMap:
    """What the copy engine is told of a tensor, in memory as the driver lays it out; ``layout`` is
    what the compiled kernel assumes of it.
    """

    def __init__(self, descriptor: Any, address: int, layout: Mapping[str, Any]) -> None:
        self._memory = (ctypes.c_uint8 * (_MAP_BYTES + _MAP_ALIGNED))()
        start = ctypes.addressof(self._memory)
        self.start, self.address = start + -start % _MAP_ALIGNED, address
        rank, size = len(descriptor.shape), int(layout["elem_size"])
        inner = [size * stride for stride in reversed(descriptor.strides[:-1])]
        _check(
            "cuTensorMapEncodeTiled",
            ctypes.c_void_p(self.start),
            ctypes.c_int(_MAP_KINDS[descriptor.base.dtype]),
            ctypes.c_uint32(rank),
            ctypes.c_void_p(address),
            (ctypes.c_uint64 * rank)(*reversed(descriptor.shape)),
            (ctypes.c_uint64 * rank)(*inner, 0),
            (ctypes.c_uint32 * rank)(*reversed(layout["block_size"])),
            (ctypes.c_uint32 * rank)(*([1] * rank)),
            ctypes.c_int(0),  # not interleaved
            ctypes.c_int(layout["swizzle"]),
            ctypes.c_int(_L2_128_BYTES),
            ctypes.c_int(0),  # zeros outside
        )
        self._replace = _function("cuTensorMapReplaceAddress")

    def move(self, address: int) -> None:
        """The same tensor elsewhere."""
        code = self._replace(ctypes.c_void_p(self.start), ctypes.c_void_p(address))
        if code:
            raise _error("cuTensorMapReplaceAddress", code)
        self.address = address


@dataclass(frozen=True)
class Launch:
    """One launch: argument ``i`` lies at ``values[places[i]]``, or is the tensor map
    ``maps[i]``.
    """

    node: _Node
    values: Any
    pointers: Any
    places: dict[int, int]
    maps: dict[int, TensorMap] = field(default_factory=dict)


def prepared_launch(compiled: Any, grid: Sequence[int], numbers: Sequence[Any]) -> Launch | None:
    """A launch of a kernel that Triton compiled; ``None`` if it needs more than addresses, integers
    and tensor maps.

    ``numbers`` are all arguments in order, addresses as integers, a descriptor with the address
    that it is for; compile-time ones are left out.
    """
    metadata = compiled.metadata
    more = ("global_scratch_size", "profile_scratch_size", "launch_cooperative_grid", "launch_pdl")
    if any(getattr(metadata, name, 0) for name in more) or metadata.num_ctas != 1:
        return None
    kinds = list(compiled.src.signature.values())
    if len(kinds) != len(numbers):
        return None
    layouts = iter(getattr(metadata, "tensordesc_meta", None) or ())
    passed: list[int | TensorMap] = []
    places: dict[int, int] = {}
    maps: dict[int, TensorMap] = {}
    for i, (kind, number) in enumerate(zip(kinds, numbers, strict=True)):
        if kind.startswith("tensordesc"):
            layout = next(layouts, None)
            if not isinstance(layout, Mapping) or not _LAYOUT <= layout.keys():
                return None
            if layout.get("fp4_padded") or number[0].base.dtype not in _MAP_KINDS:
                return None
            maps[i] = TensorMap(number[0], number[1], layout)
            passed += [maps[i], *number[0].shape, *number[0].strides]
        elif kind.startswith("*") or kind in _INTEGERS:
            places[i] = len(passed)
            passed.append(int(number))
        elif kind != "constexpr":
            return None
    return _laid_out(compiled, grid, passed, places, maps)


def _laid_out(
    compiled: Any,
    grid: Sequence[int],
    passed: Sequence[int | TensorMap],
    places: dict[int, int],
    maps: dict[int, TensorMap],
) -> Launch:
    """Arguments in memory, each with its address in a list, as the driver reads them."""
    values = (ctypes.c_uint64 * (len(passed) + _EXTRA))()
    start = ctypes.addressof(values)
    pointers = (ctypes.c_void_p * len(values))(*(start + 8 * i for i in range(len(values))))
    for place, value in enumerate(passed):
        if isinstance(value, TensorMap):
            pointers[place] = value.start
        else:
            values[place] = value & 0xFFFFFFFFFFFFFFFF
    node = _Node(
        compiled.function,
        (ctypes.c_uint * 3)(*[*grid, 1, 1][:3]),
        (ctypes.c_uint * 3)(32 * compiled.metadata.num_warps, 1, 1),
        compiled.metadata.shared,
        ctypes.addressof(pointers),
        None,
    )
    return Launch(node, values, pointers, places, maps)


class Graph:
    """Launches, one after the other, that are asked for at once."""

    def __init__(self, launches: Sequence[Launch], stream: int) -> None:
        self.launches, self._nodes = tuple(launches), list[ctypes.c_void_p]()
        self._graph, self._executable = ctypes.c_void_p(), ctypes.c_void_p()
        _check("cuGraphCreate", ctypes.byref(self._graph), 0)
        for launch in launches:
            self._add(launch)
        made = ctypes.byref(self._executable), self._graph, ctypes.c_ulonglong(0)
        _check("cuGraphInstantiateWithFlags", *made)
        self._run = _function("cuGraphLaunch")
        self._change = _function("cuGraphExecKernelNodeSetParams")
        self._stream = ctypes.c_void_p(stream)
        self._references = [ctypes.byref(launch.node) for launch in launches]
        weakref.finalize(self, _destroy, self._executable, self._graph).atexit = False

    def _add(self, launch: Launch) -> None:
        before = (ctypes.c_void_p * 1)(*(n.value for n in self._nodes[-1:]))
        node = ctypes.c_void_p()
        count = ctypes.c_size_t(len(self._nodes[-1:]))
        to = ctypes.byref(node), self._graph, before if self._nodes else None, count
        _check("cuGraphAddKernelNode", *to, ctypes.byref(launch.node))
        self._nodes.append(node)

    def run(self, changed: set[int]) -> None:
        """Launch all of them, those in ``changed`` with their arguments as they are in memory now;
        empties that set.
        """
        for index in changed:
            code = self._change(self._executable, self._nodes[index], self._references[index])
            if code:
                raise _error("cuGraphExecKernelNodeSetParams", code)
        changed.clear()
        code = self._run(self._executable, self._stream)
        if code:
            raise _error("cuGraphLaunch", code)


def _destroy(executable: ctypes.c_void_p, graph: ctypes.c_void_p) -> None:
    """Give a graph back; one that still runs stays alive in the driver until it is done."""
    _function("cuGraphExecDestroy")(executable)
    _function("cuGraphDestroy")(graph)


@functools.cache
def _function(name: str) -> Callable[..., int]:
    function: Callable[..., int] = getattr(ctypes.CDLL("libcuda.so.1"), name)
    return function


def _check(name: str, *arguments: Any) -> None:
    code = _function(name)(*arguments)
    if code:
        raise _error(name, code)


def _error(name: str, code: int) -> RuntimeError:
    return RuntimeError(f"CUDA error {code} from {name}")


__all__ = ["ALIGNED", "Graph", "Launch", "TensorMap", "prepared_launch"]
