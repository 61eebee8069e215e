"""One MoE block with few tokens: what the host takes to ask for it, what the GPU takes to do it.

Run from the project's root:

    python -m benchmarks.decode                                all models, T = 1 to 256
    python -m benchmarks.decode --only olmoe --tokens 1 16     some

How it is measured. The blocks are transformers' own classes with random bf16 weights. `host us` is
the time until a forward call under no_grad returns: the median over rounds of calls in a row, few
enough not to fill the GPU's queue, without waiting for it. `gpu us` is one call in a replayed CUDA
graph of many calls on rotating inputs, so without the host; eager experts cannot be captured,
and what is captured already has its own launch.
`share` is the part of it that reading the chosen experts' weights once takes at the bandwidth of a
large copy.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import moec

from .hf_blocks import SHAPES, Shape, random_block
from .report import describe, environment, markdown_table, write_json

ROTATION = 8
CALLS, ROUNDS = 40, 9
IMPLEMENTATIONS = ("moec", "moec, reduce-overhead", "grouped_mm", "eager")


def copy_bandwidth() -> float:
    """Bytes a second of a large copy, read and written."""
    a = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.numel() / (1e-6 * device_us(lambda _: b.copy_(a), 5))


def device_us(call: Callable[[int], Any], count: int) -> float:
    """Microseconds of one of ``count`` calls in a CUDA graph."""
    side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(side):
        for i in range(2 * ROTATION):
            call(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            call(i)
    times: list[float] = []
    for _ in range(7):
        before: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        after: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        before.record()
        graph.replay()
        after.record()
        after.synchronize()
        times.append(1e3 * before.elapsed_time(after) / count)
    return statistics.median(times)


def host_us(call: Callable[[int], Any]) -> float:
    """Microseconds until a call returns."""
    times = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for i in range(CALLS):
            call(i)
        times.append(1e6 * (time.perf_counter() - start) / CALLS)
    return statistics.median(times)


def prepared(block: Any, implementation: str) -> Any:
    """The block, compiled or with an implementation of transformers' own."""
    if implementation.startswith("moec"):
        return moec.compile(block, mode=implementation.partition(", ")[2] or "default")
    block.experts.config._experts_implementation = implementation
    return block


def measure(shape: Shape, implementation: str, tokens: int) -> dict[str, Any]:
    """One row."""
    block = random_block(shape, "cuda", torch.bfloat16)
    x = torch.randn(ROTATION, 1, tokens, shape.hidden, device="cuda").bfloat16().unbind()
    run = prepared(block, implementation)

    def call(i: int) -> Any:
        return run(x[i % ROTATION])

    with torch.no_grad():
        for i in range(2 * ROTATION):
            call(i)
        row = {"host us": host_us(call)}
        if implementation in ("moec", "grouped_mm"):
            row["gpu us"] = device_us(call, 5 * ROTATION)
    return row


def experts_hit(shape: Shape, tokens: int) -> float:
    """How many experts are chosen by random routing, on average."""
    return shape.experts * (1 - (1 - shape.top_k / shape.experts) ** tokens)


def main() -> None:
    """Measure and print."""
    options = parse()
    warnings.simplefilter("ignore")
    facts = environment("cuda")
    print(describe(facts), flush=True)
    bandwidth, rows = copy_bandwidth(), []
    print(f"copy: {1e-9 * bandwidth:.0f} GB/s", flush=True)
    for name in options.only:
        rows += rows_of(name, SHAPES[name], bandwidth, options)
    write_json(options.json, {"environment": facts, "rows": rows})


def rows_of(
    name: str, shape: Shape, bandwidth: float, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """All rows of one model, printed as a table."""
    rows = []
    for tokens in options.tokens:
        floor = 6e6 * experts_hit(shape, tokens) * shape.hidden * shape.intermediate / bandwidth
        for implementation in options.against:
            found = measure(shape, implementation, tokens)
            gpu = found.get("gpu us")
            row = {"T": tokens, "implementation": implementation, **found}
            rows.append({"model": name, **row, "share": floor / gpu if gpu else None})
            torch.cuda.empty_cache()
    header = ("T", "implementation", "host us", "gpu us", "share")
    print(f"\n**{name}**\n\n{markdown_table(header, [cells(r, header) for r in rows])}", flush=True)
    return rows


def cells(row: dict[str, Any], header: Sequence[str]) -> list[str]:
    """A row as text."""
    values = [row.get(name) for name in header]
    digits = {"share": 2}
    return [
        "-" if v is None else f"{v:.{digits.get(n, 1)}f}" if isinstance(v, float) else str(v)
        for n, v in zip(header, values, strict=True)
    ]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [n for n in SHAPES if n != "tiny"]
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 16, 64, 256])
    parser.add_argument("--against", nargs="+", choices=IMPLEMENTATIONS, default=IMPLEMENTATIONS)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
