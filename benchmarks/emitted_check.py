"""Emitted kernels on a GPU: right at awkward sizes, and how fast.

    python -m benchmarks.emitted_check                        every model, template and T
    python -m benchmarks.emitted_check --only olmoe --templates tma --no-times

Each model and template runs in a process of its own with a time limit. Blocks are built in the IR
(router, softmax, top-k, SwiGLU experts in bf16), so nothing but moec and torch takes part. Errors
are relative, in norm, to float32 products of the same bf16 weights. Times are medians.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from moec.ir import Builder, Graph, Type, Value, dim
from moec.manager import PassManager
from moec.pipeline import pipeline
from moec.runtime.artifact import Artifact, build


@dataclasses.dataclass(frozen=True)
class Shape:
    """One block's sizes."""

    hidden: int
    inner: int
    experts: int
    choices: int

    def flops(self, tokens: int) -> float:
        """Of the forward pass's products."""
        return 2.0 * tokens * self.choices * self.hidden * self.inner * 3


SHAPES = {
    "olmoe": Shape(2048, 1024, 64, 8),
    "qwen3-30b": Shape(2048, 768, 128, 8),
    "mixtral-8x7b": Shape(4096, 14336, 8, 2),
    "s1.4b-n256": Shape(768, 256, 128, 8),
    "s7b-n256": Shape(1536, 256, 128, 8),
    "s7b-n512": Shape(1536, 512, 64, 4),
    "s7b-n1024": Shape(1536, 1024, 32, 2),
    "s30b-n256": Shape(4096, 256, 256, 16),
    "s30b-n512": Shape(4096, 512, 128, 8),
    "s30b-n1024": Shape(4096, 1024, 64, 4),
    "s120b-n1024": Shape(4096, 1024, 128, 8),
}
# name -> whether the copy engine may be used, and Gluon
TEMPLATES = {"gluon": (True, True), "tma": (True, False), "pointer": (False, False)}


def block_graph(shape: Shape, dtype: str = "bf16") -> Graph:
    """Router, top-k of a softmax, SwiGLU experts, weighted sum."""
    tokens, b = dim("T"), Builder({"T": (0, 1 << 24)})
    h, i, e, k = shape.hidden, shape.inner, shape.experts, shape.choices
    x = Value(Type(dtype, (tokens, h)), "x")
    router = Value(Type(dtype, (e, h)), "router")
    gate_up = Value(Type(dtype, (e, 2 * i, h)), "gate_up")
    down = Value(Type(dtype, (e, h, i)), "down")
    logits = b("t.cast", b("t.linear", x, router, hint="logits"), dtype="f32", hint="logits")
    scores = b("moe.activate", logits, fn="softmax", hint="scores")
    index = b("moe.select", scores, k=k, hint="index")
    weights = b("moe.weight", scores, index, norm="sum", hint="weights")
    perm, offsets, inverse = b(
        "moe.dispatch", index, experts=e, hint=("perm", "offsets", "inverse")
    )
    rows = b("moe.gather", x, perm, inverse, hint="rows")
    product = b("moe.grouped_mm", rows, gate_up, offsets, hint="h")
    gate, up = b("t.split", product, parts=2, hint=("gate", "up"))
    act = b("t.mul", b("t.silu", gate, hint="silu"), up, hint="act")
    out = b("moe.grouped_mm", act, down, offsets, hint="expert_out")
    y = b("moe.combine", out, perm, inverse, weights, dtype=dtype, hint="y")
    return b.graph("block", [x, router, gate_up, down], [y])


def artifact(
    shape: Shape, descriptors: bool, training: bool, options: str = "", gluon: bool = False
) -> Artifact:
    """The block compiled for Triton; ``options`` are further ones of ``lower``."""
    text = pipeline("triton", training, descriptors, gluon=gluon)
    if options:
        text += f", lower{{descriptors={str(descriptors).lower()},{options}}}"
    manager = PassManager(text)
    mode = "training" if training else "inference"
    return build(manager.run(block_graph(shape)), "triton", mode, manager.history)


def inputs(shape: Shape, tokens: int, routing: str) -> list[torch.Tensor]:
    """Random tensors; ``routing`` "one" sends every token to the same experts."""
    h, i, e = shape.hidden, shape.inner, shape.experts

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, device="cuda").bfloat16()

    x, router = random(tokens, h), random(e, h) / h**0.5
    if routing == "one":
        x[:, 0], router[: shape.choices, 0] = 1.0, 12.0
    if routing == "skewed":  # logits of some experts are higher by a constant
        x[:, 0], router[:, 0] = 1.0, -1.5 * torch.arange(1, e + 1, device="cuda").log().bfloat16()
    weights = [random(e, 2 * i, h) / h**0.5, random(e, h, i) / i**0.5]
    return [x, router, *weights]


def reference(shape: Shape, data: list[torch.Tensor], dy: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients in float32, one expert at a time."""
    leaves = [t.float().requires_grad_() for t in data]
    x, router, gate_up, down = leaves
    # the routing of the bf16 logits: rounding must not send a token elsewhere
    rounded = (data[0] @ data[1].t()).float()
    index = rounded.softmax(-1).topk(shape.choices, dim=-1).indices
    logits = x @ router.t()
    logits = logits + (rounded - logits).detach()
    weights = logits.softmax(-1).gather(1, index)
    weights = weights / weights.sum(-1, keepdim=True)
    y = torch.zeros_like(x)
    for e in range(shape.experts):
        token, choice = (index == e).nonzero(as_tuple=True)
        gate, up = (x[token] @ gate_up[e].t()).chunk(2, -1)
        rows = (torch.nn.functional.silu(gate) * up) @ down[e].t()
        y = y.index_add(0, token, rows * weights[token, choice, None])
    grads = torch.autograd.grad(y, leaves, dy.float())
    return [y.detach(), *grads]


def relative(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    """The relative error in norm."""
    return float((actual.float() - wanted).norm() / wanted.norm().clamp_min(1e-30))


def run_both(compiled: Artifact, data: list[torch.Tensor], dy: torch.Tensor) -> list[Any]:
    """Output and gradients."""
    outputs, saved = compiled.forward(*data)
    assert compiled.backward is not None
    kept = [data[i] for i in compiled.backward_inputs]
    return [*outputs, *compiled.backward([*kept, *saved, dy])]


def poison() -> None:
    """Leave NaN in the memory that the next allocations get."""
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    held = [torch.full((1 << 28,), torch.nan, device="cuda") for _ in range(min(free >> 30, 24))]
    held += [torch.full((1 << 18,), torch.nan, device="cuda") for _ in range(32)]
    del held


def check(shape: Shape, compiled: Artifact) -> dict[str, list[float]]:
    """Errors of output and gradients (x, router, gate_up, down), in memory full of NaN."""
    found = {}
    for tokens in (1, 257, 4096):
        for routing in ("random", "one", "skewed"):
            torch.manual_seed(0)
            data = inputs(shape, tokens, routing)
            dy = torch.randn_like(data[0])
            wanted = reference(shape, data, dy)
            poison()
            actual = run_both(compiled, data, dy)
            found[f"{tokens} {routing}"] = [
                round(relative(a, w), 5) for a, w in zip(actual, wanted, strict=True)
            ]
            again = run_both(compiled, data, dy)
            assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True)), "not equal"
            del wanted, actual, again
            torch.cuda.empty_cache()
    return found


def median_ms(call: Callable[[], object], repeats: int = 20) -> float:
    """The median time of a call by events, after three warm-up calls."""
    measured = []
    for turn in range(-3, repeats):
        before: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        after: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        before.record()
        call()
        after.record()
        after.synchronize()
        if turn >= 0:
            measured.append(before.elapsed_time(after))
    return float(statistics.median(measured))


def stream_ms(call: Callable[[], object], repeats: int = 20) -> float:
    """The mean time of calls in a row: the host runs ahead."""
    call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start) / repeats


def times(shape: Shape, training: Artifact, inference: Artifact) -> dict[str, list[float]]:
    """Milliseconds of forward, and of forward and backward, by T: one call, and calls in a row."""
    found = {}
    for tokens in (4096, 16384):
        torch.manual_seed(0)
        data = inputs(shape, tokens, "random")
        dy = torch.randn_like(data[0])
        calls = (partial(inference.forward, *data), partial(run_both, training, data, dy))
        measured = [f(call) for call in calls for f in (median_ms, stream_ms)]
        found[str(tokens)] = [*measured, shape.flops(tokens) / 1e9]
    return found


def worker(name: str, template: str, timed: bool, options: str) -> None:
    """One model and template; prints JSON lines."""
    shape, (descriptors, gluon) = SHAPES[name], TEMPLATES[template]
    training = artifact(shape, descriptors, True, options, gluon)
    print(json.dumps({"errors": check(shape, training)}), flush=True)
    if timed:
        inference = artifact(shape, descriptors, False, options, gluon)
        print(json.dumps({"times": times(shape, training, inference)}), flush=True)


def main() -> None:
    """Run every case in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="*", default=list(SHAPES))
    parser.add_argument("--templates", nargs="*", default=list(TEMPLATES))
    parser.add_argument("--no-times", action="store_true")
    parser.add_argument("--limit", type=int, default=120, help="seconds for each case")
    parser.add_argument("--options", default="", help="further options of the pass lower")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        name, template = arguments.worker
        worker(name, template, not arguments.no_times, arguments.options)
        return
    for name in arguments.only:
        for template in arguments.templates:
            run_case(name, template, arguments)


def run_case(name: str, template: str, arguments: argparse.Namespace) -> None:
    """Run one case within its time limit and print what it found."""
    command = [sys.executable, "-m", "benchmarks.emitted_check", "--worker", name, template]
    command += ["--options", arguments.options] if arguments.options else []
    command += ["--no-times"] if arguments.no_times else []
    print(f"## {name} {template}", flush=True)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=arguments.limit)
    except subprocess.TimeoutExpired as error:
        print(f"stopped after {arguments.limit} s: {error.stdout!r}", flush=True)
        return
    for line in done.stdout.splitlines():
        show(json.loads(line))
    if done.returncode:
        print(done.stderr[-3000:], flush=True)


def show(record: dict[str, dict[str, list[float]]]) -> None:
    """Print a record as rows of a table."""
    for case, row in record.get("errors", {}).items():
        print(f"T {case:12} errors of y, dx, drouter, dgate_up, ddown: {row}", flush=True)
    for case, (one, in_row, both, both_row, flops) in record.get("times", {}).items():
        print(
            f"T {case:8} forward {one:7.3f} ms, in a row {in_row:7.3f} "
            f"({flops / in_row:.0f} TFLOP/s); with backward {both:7.3f}, "
            f"in a row {both_row:7.3f} ({3 * flops / both_row:.0f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
