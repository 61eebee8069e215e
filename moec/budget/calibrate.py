"""Measuring a device's rates: copies, small kernels, products, experts' products, attention.

Each kind of work is done at growing sizes until it takes long enough to be seen, then timed for a
share of the time that is left. Rates are of medians.
"""

from __future__ import annotations

import datetime
import functools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from moec.budget.rates import ATTENTION, ATTENTION_BACKWARD, GROUPED, PRODUCTS, WORK, Rates
from moec.budget.rates_file import Calibration, device_name
from moec.cost import op_cost
from moec.execute import op_times
from moec.inputs import random_inputs
from moec.ir.dims import evaluate
from moec.ir.graph import Graph
from moec.ir.parser import parse
from moec.ir.types import DTYPES
from moec.manager import PassManager
from moec.pipeline import pipeline
from moec.targets import choose_target, has_descriptors, has_gluon
from moec.timing import Call, in_turns
from moec.tuning.file import versions

# Milliseconds after which a size is large enough: then neither clocks nor launches are seen.
_LONG = {"cuda": 1.0, "cpu": 20.0}
_LEAST_ROUNDS, _MOST_ROUNDS = 3, 31
_KERNELS = 100  # small ones in a row
_MEGABYTE = 1 << 20
_HEADS, _HEAD = 16, 128


@dataclass(frozen=True)
class Job:
    """One rate to measure: what of, the dtype where it depends on it, and how, in so many
    seconds.
    """

    what: str
    dtype: str
    measure: Callable[[float], float]

    def __str__(self) -> str:
        return f"{self.what} {self.dtype}".strip()


@dataclass(frozen=True)
class Shapes:
    """The sizes that are tried of each kind of work; ``experts``, ``chosen`` of them a token,
    ``hidden`` and ``inner`` are those of the grouped product.
    """

    copies: Sequence[int]
    sides: Sequence[int]
    lengths: Sequence[int]
    tokens: Sequence[int]
    experts: int
    chosen: int
    hidden: int
    inner: int


_GPU = Shapes(
    [256 * _MEGABYTE, 1024 * _MEGABYTE],
    [1024, 2048, 4096, 8192],
    [1024, 2048, 4096, 8192],
    [2048, 8192, 16384],
    *(64, 8, 2048, 1024),
)
_CPU = Shapes(
    [64 * _MEGABYTE, 256 * _MEGABYTE],
    [128, 256, 512, 1024, 2048],
    [128, 256, 512, 1024, 2048],
    [64, 256, 1024, 4096],
    *(16, 4, 512, 512),
)


def shapes_of(device: torch.device) -> Shapes:
    """Sizes that fill a device of a kind."""
    return _GPU if device.type == "cuda" else _CPU


def jobs(device: torch.device, shapes: Shapes) -> list[Job]:
    """All rates of a device, what plans depend on most first."""
    found = [
        Job("bytes", "", functools.partial(_copied, device, shapes)),
        Job("launch", "", functools.partial(_launched, device)),
    ]
    ways = {
        PRODUCTS: _multiplied,
        GROUPED: _grouped,
        ATTENTION: _attended,
        ATTENTION_BACKWARD: _attended_backward,
    }
    for dtype in ("bf16", "f32", "f16", "f64"):
        for what, way in ways.items():
            if dtype != "f64" or what == PRODUCTS:  # nobody trains in it
                found.append(Job(what, dtype, functools.partial(way, device, shapes, dtype)))
    return found


def calibrated(
    device: torch.device,
    seconds: float,
    report: Callable[[str], object],
    complain: Callable[[str], object],
    shapes: Shapes | None = None,
) -> Calibration:
    """The rates of a device, measured in about so many seconds. ``report`` is told of each
    measurement, ``complain`` what could not be measured and so is left out.

    Raises:
        RuntimeError: copies, launches or any product cannot be measured.
    """
    deadline = time.monotonic() + seconds
    found: dict[str, dict[str, float]] = {kind: {} for kind in ("bytes", "launch", *WORK)}
    every = jobs(device, shapes or shapes_of(device))
    for place, job in enumerate(every):
        share = (deadline - time.monotonic()) / (len(every) - place)
        is_needed = not job.dtype or (job.what == PRODUCTS and not found[PRODUCTS])
        value = _measured(job, share, is_needed, complain)
        if value is not None:
            found[job.what][job.dtype] = value
        report(str(job))
    rates = Rates(
        **{kind: found[kind] for kind in WORK}, bytes=found["bytes"][""], launch=found["launch"][""]
    )
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return Calibration(device_name(device), device.type, versions(), today, rates)


def _measured(
    job: Job, share: float, is_needed: bool, complain: Callable[[str], object]
) -> float | None:
    """A rate; ``None`` where it cannot be had, or not in time."""
    if share <= 0 and not is_needed:
        complain(f"{job} is not measured: no time is left")
        return None
    try:
        return _rounded(job.measure(max(share, 0.0)))
    except Exception as error:  # libraries and kernel compilers fail in any way
        if is_needed:
            raise
        first = next(iter(str(error).splitlines()), "")
        complain(f"{job} is not measured: {type(error).__name__}: {first}")
        return None


def _rounded(value: float) -> float:
    """Four digits, more than are known."""
    return float(f"{value:.4g}")


def _grown(
    made: Iterable[tuple[Call, float]], device: torch.device, deadline: float
) -> tuple[Call, float, float]:
    """The first call that takes long enough, else the last that fits into memory and time; its
    work and seconds.
    """
    found: tuple[Call, float, float] | None = None
    for call, work in _while_memory_lasts(iter(made)):
        ((ms,),) = in_turns([call], device, 1)
        found = call, work, ms / 1e3
        if ms >= _LONG[device.type] or time.monotonic() > deadline:
            break
    if found is None:
        raise RuntimeError("there is no memory for the smallest size")
    return found


def _while_memory_lasts(made: Iterator[tuple[Call, float]]) -> Iterator[tuple[Call, float]]:
    try:
        yield from made
    except torch.OutOfMemoryError:
        return


def _rate(made: Iterable[tuple[Call, float]], device: torch.device, seconds: float) -> float:
    """Work a second, of calls each with its work."""
    deadline = time.monotonic() + seconds
    call, work, took = _grown(made, device, time.monotonic() + seconds / 2)
    rounds = _rounds(deadline - time.monotonic(), took)
    (samples,) = in_turns([call], device, rounds)
    return work / (statistics.median(samples) / 1e3)


def _rounds(seconds: float, took: float) -> int:
    """How many rounds fit, between the least and the most."""
    return min(max(int(seconds / max(took, 1e-6)), _LEAST_ROUNDS), _MOST_ROUNDS)


# kinds of work
def _copied(device: torch.device, shapes: Shapes, seconds: float) -> float:
    """Bytes a second, read and written."""

    def made() -> Iterator[tuple[Call, float]]:
        for size in shapes.copies:
            source = torch.zeros(size, dtype=torch.int8, device=device)
            yield functools.partial(torch.empty_like(source).copy_, source), 2.0 * size

    return _rate(made(), device, seconds)


def _launched(device: torch.device, seconds: float) -> float:
    """Seconds of one more small kernel; a GPU is kept busy until the host is done with all."""
    x = torch.zeros(1024, device=device)
    block = torch.zeros(256 * _MEGABYTE if device.type == "cuda" else 0, dtype=torch.int8)
    block = block.to(device)

    def few() -> None:
        for _ in range(12 if device.type == "cuda" else 0):
            block.bitwise_not_()

    def many() -> None:
        few()
        for _ in range(_KERNELS):
            torch.ops.aten.add.Tensor(x, x)

    rounds = _rounds(seconds, 5e-3)
    alone, both = in_turns([few, many], device, rounds)
    return max(statistics.median(both) - statistics.median(alone), 0.0) / _KERNELS / 1e3


def _multiplied(device: torch.device, shapes: Shapes, dtype: str, seconds: float) -> float:
    """Operations a second of products of square matrices."""

    def made() -> Iterator[tuple[Call, float]]:
        for side in shapes.sides:
            left, right = (_random((side, side), dtype, device) for _ in range(2))
            yield functools.partial(torch.mm, left, right), 2.0 * side**3

    return _rate(made(), device, seconds)


def _random(shape: Sequence[int], dtype: str, device: torch.device) -> torch.Tensor:
    return torch.randn(*shape, device=device).to(DTYPES[dtype])


def _attended(device: torch.device, shapes: Shapes, dtype: str, seconds: float) -> float:
    """Operations a second of attention to what came before."""

    def made() -> Iterator[tuple[Call, float]]:
        for length in shapes.lengths:
            shape = (1, _HEADS, length, _HEAD)
            q, k, v = (_random(shape, dtype, device) for _ in range(3))
            call = functools.partial(scaled_dot_product_attention, q, k, v, is_causal=True)
            yield call, 2.0 * _HEADS * length**2 * _HEAD

    with torch.no_grad():
        return _rate(made(), device, seconds)


def _attended_backward(device: torch.device, shapes: Shapes, dtype: str, seconds: float) -> float:
    """The same of its gradients: two products and a half where the forward has one."""

    def made() -> Iterator[tuple[Call, float]]:
        for length in shapes.lengths:
            shape = (1, _HEADS, length, _HEAD)
            q, k, v = (_random(shape, dtype, device).requires_grad_() for _ in range(3))
            result = scaled_dot_product_attention(q, k, v, is_causal=True)
            about = result, (q, k, v), torch.ones_like(result)
            call = functools.partial(torch.autograd.grad, *about, retain_graph=True)
            yield call, 5.0 * _HEADS * length**2 * _HEAD

    with torch.enable_grad():
        return _rate(made(), device, seconds)


# experts
def experts_graph(dtype: str, shapes: Shapes) -> Graph:
    """One product of experts, of rows that a router chose."""
    e, k, d, n = shapes.experts, shapes.chosen, shapes.hidden, shapes.inner
    return parse(
        f"graph @experts(%x: {dtype}[T, {d}], %chosen: i32[T, {k}], %w: {dtype}[{e}, {n}, {d}])"
        " where 0 <= T <= 65536 {\n"
        f"  %perm, %offsets, %inverse = moe.dispatch(%chosen) {{experts={e}}}"
        f" : i32[{k}*T], i32[{e + 1}], i32[T, {k}]\n"
        f"  %rows = moe.gather(%x, %perm, %inverse) : {dtype}[{k}*T, {d}]\n"
        f"  %y = moe.grouped_mm(%rows, %w, %offsets) : {dtype}[{k}*T, {n}]\n"
        "  return %y\n}\n"
    )


def _grouped(device: torch.device, shapes: Shapes, dtype: str, seconds: float) -> float:
    """Operations a second of the product as moec emits it for the device."""
    target = choose_target(None, device)
    text = pipeline(target, False, has_descriptors(device), False, has_gluon(device))
    graph = PassManager(text).run(experts_graph(dtype, shapes))
    deadline = time.monotonic() + seconds
    work = took = 0.0
    for tokens in shapes.tokens:
        work, took = _timed(graph, target, {"T": tokens}, device, 1)
        if 1e3 * took >= _LONG[device.type] or time.monotonic() > deadline - seconds / 2:
            break
    work, took = _timed(
        graph, target, {"T": tokens}, device, _rounds(deadline - time.monotonic(), took)
    )
    return work / took


def _timed(
    graph: Graph, target: str, sizes: Mapping[str, int], device: torch.device, rounds: int
) -> tuple[float, float]:
    """Operations and seconds of a graph's products."""
    arguments = random_inputs(graph, sizes, device=device.type)
    times = op_times(graph, target, arguments, rounds)
    flops = {op: float(evaluate(op_cost(op).flops, sizes)) for op in graph.ops}
    return sum(flops.values()), sum(times[op] for op in times if flops[op]) / 1e3


__all__ = ["Job", "Shapes", "calibrated", "experts_graph", "jobs", "shapes_of"]
