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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

# What Triton may assume of an address that it was compiled for.
ALIGNED = 16
# Memory for scratch and for profiling, which these kernels do not use: further arguments.
_EXTRA = 4
_INTEGERS = {"i1", "i8", "i16", "i32", "i64"}


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


@dataclass(frozen=True)
class Launch:
    """One launch: argument ``i`` lies at ``values[places[i]]``."""

    node: _Node
    values: Any
    pointers: Any
    places: dict[int, int]


def prepared_launch(compiled: Any, grid: Sequence[int], numbers: Sequence[Any]) -> Launch | None:
    """A launch of a kernel that Triton compiled; ``None`` if it needs more than addresses and
    integers.

    ``numbers`` are all arguments in order, addresses as integers; compile-time ones are left out.
    """
    metadata = compiled.metadata
    more = ("global_scratch_size", "profile_scratch_size", "launch_cooperative_grid", "launch_pdl")
    if any(getattr(metadata, name, 0) for name in more) or metadata.num_ctas != 1:
        return None
    kinds = list(compiled.src.signature.values())
    if len(kinds) != len(numbers):
        return None
    passed = [i for i, kind in enumerate(kinds) if kind != "constexpr"]
    if not all(kinds[i].startswith("*") or kinds[i] in _INTEGERS for i in passed):
        return None
    values = (ctypes.c_uint64 * (len(passed) + _EXTRA))()
    for place, i in enumerate(passed):
        values[place] = int(numbers[i]) & 0xFFFFFFFFFFFFFFFF
    start = ctypes.addressof(values)
    pointers = (ctypes.c_void_p * len(values))(*(start + 8 * i for i in range(len(values))))
    node = _Node(
        compiled.function,
        (ctypes.c_uint * 3)(*[*grid, 1, 1][:3]),
        (ctypes.c_uint * 3)(32 * metadata.num_warps, 1, 1),
        metadata.shared,
        ctypes.addressof(pointers),
        None,
    )
    return Launch(node, values, pointers, {i: place for place, i in enumerate(passed)})


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


__all__ = ["ALIGNED", "Graph", "Launch", "prepared_launch"]
