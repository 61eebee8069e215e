"""One MoE block on one GPU: moec, eager experts, grouped_mm, and grouped_mm under torch.compile.

Run from the project's root:

    python -m benchmarks.block                          all sizes, T = 4096 and 16384
    python -m benchmarks.block --quick --only olmoe     one size, T = 4096, fewer repeats
    python -m benchmarks.block --device cpu --only tiny --tokens 64

How it is measured. The blocks are transformers' own classes with random bf16 weights, shared by all
implementations. Times are medians of single calls by CUDA events, host launches included, each on
another of four inputs and with a flushed L2 cache. `forward` runs under no_grad; `both` is a
forward pass and a backward pass to the input and every parameter. FLOPs are those of the model
(3 products per routed row and the router; three times as many for `both`), not those performed.
Errors are relative, in norm, to a float64 computation from the same bf16 values; the inputs are
drawn so that rounding cannot change the routing. torch.compile is reset for every T, so it may
specialise; moec compiles once for all T.
"""

import argparse
import copy
import dataclasses
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import moec

from .hf_blocks import DEFAULT_SHAPES, ROTATION, SHAPES, Shape, random_block, random_inputs
from .reference import Result, Weights, reference, relative_error
from .report import describe, environment, markdown_table, write_json
from .timing import Stopwatch


def with_experts(block: Any, implementation: str) -> Any:
    """The same block, sharing its parameters, with another of transformers' implementations."""
    twin = copy.deepcopy(block, {id(parameter): parameter for parameter in block.parameters()})
    twin.experts.config._experts_implementation = implementation
    return twin


def compiled_grouped(block: Any) -> Any:
    """grouped_mm under torch.compile, with no memory of earlier shapes."""
    torch._dynamo.reset()
    return torch.compile(with_experts(block, "grouped_mm"))


IMPLEMENTATIONS: dict[str, Callable[[Any], Any]] = {
    "moec": moec.compile,
    "eager": lambda block: with_experts(block, "eager"),
    "grouped_mm": lambda block: with_experts(block, "grouped_mm"),
    "grouped_mm + torch.compile": compiled_grouped,
}


@dataclasses.dataclass
class Case:
    """One block at one T, with what all implementations need."""

    name: str
    shape: Shape
    block: Any
    inputs: list[Tensor]
    gradient: Tensor
    expected: Result

    @property
    def tokens(self) -> int:
        return self.inputs[0].shape[1]


def make_case(name: str, block: Any, tokens: int) -> Case:
    """Draw inputs and compute the float64 reference on the first of them."""
    shape = SHAPES[name]
    inputs = random_inputs(block, shape, tokens)
    gradient = torch.randn_like(inputs[0])
    experts = block.experts
    expected = reference(
        Weights(block.gate.weight, experts.gate_up_proj, experts.down_proj),
        inputs[0][0],
        gradient[0],
        top_k=shape.top_k,
        normalise=shape.normalise,
        activation=experts.act_fn,
        kept={0, shape.experts // 2, shape.experts - 1},
    )
    return Case(name, shape, block, inputs, gradient, expected)


def errors(case: Case, model: Any) -> dict[str, float]:
    """Relative errors of the output and of each gradient."""
    hidden = case.inputs[0].clone().requires_grad_()
    case.block.zero_grad()
    output = model(hidden)
    output.backward(case.gradient)
    expected, experts = case.expected, case.block.experts
    found = {
        "output": relative_error(output[0], expected.output),
        "hidden": relative_error(present(hidden.grad)[0], expected.hidden),
        "router": relative_error(present(case.block.gate.weight.grad), expected.router),
    }
    for name, by_expert in (("gate_up_proj", expected.gate_up), ("down_proj", expected.down)):
        gradient = present(getattr(experts, name).grad)
        found[name] = max(relative_error(gradient[at], value) for at, value in by_expert.items())
    case.block.zero_grad()
    return found


def present(gradient: Tensor | None) -> Tensor:
    """The gradient, which backward must have left."""
    if gradient is None:
        raise RuntimeError("backward left a gradient out")
    return gradient


def times(case: Case, model: Any, stopwatch: Stopwatch) -> dict[str, float]:
    """Median milliseconds of the forward pass, and of forward and backward."""

    def forward(turn: int) -> None:
        with torch.no_grad():
            model(case.inputs[turn % ROTATION])

    leaves = [hidden.clone().requires_grad_() for hidden in case.inputs]

    def both(turn: int) -> None:
        model(leaves[turn % ROTATION]).backward(case.gradient)

    def forget_gradients() -> None:
        case.block.zero_grad()
        for leaf in leaves:
            leaf.grad = None

    measured = {"forward_ms": stopwatch.median_ms(forward)}
    measured["both_ms"] = stopwatch.median_ms(both, prepare=forget_gradients)
    if stopwatch.device == "cuda":
        forget_gradients()
        measured["both_peak_mib"] = peak_mib(lambda: both(0))
    forget_gradients()
    return measured


def peak_mib(call: Callable[[], object]) -> float:
    """What `call` allocates on the GPU at its highest, above what was held before."""
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - held) / 2**20


def measure(case: Case, implementation: str, model: Any, stopwatch: Stopwatch) -> dict[str, Any]:
    """One row of the table: figures, or the reason why there are none."""
    row: dict[str, Any] = {
        "block": case.name,
        "tokens": case.tokens,
        "implementation": implementation,
    }
    try:
        row["errors"] = errors(case, model)
        row |= times(case, model, stopwatch)
    except Exception as failure:  # one implementation's failure must not cost the others' figures
        row["failed"] = reason(failure)
        case.block.zero_grad()
    for name, factor in (("forward", 1), ("both", 3)):
        if f"{name}_ms" in row:
            flops = factor * case.shape.flops(case.tokens)
            row[f"{name}_tflops"] = flops / row[f"{name}_ms"] * 1e-9
    return row


def reason(failure: Exception) -> str:
    """The first line of an exception, short enough for a cell."""
    first = (str(failure).strip().splitlines() or [""])[0]
    return f"{type(failure).__name__}: {first}"[:100]


def prepare(make: Callable[[Any], Any], block: Any) -> Any:
    """The implementation's model, or a stand-in that raises what building it raised."""
    try:
        return make(block)
    except Exception as failure:  # reported in the cells of this implementation
        caught = failure

        def failing(_: Tensor) -> Tensor:
            raise caught

        return failing


HEADER = (
    "implementation",
    "forward ms",
    "TFLOP/s",
    "both ms",
    "TFLOP/s",
    "peak MiB",
    "error output",
    "error gradients",
)


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of figures as text."""
    if "failed" in row:
        return (f"{row['implementation']}: {row['failed']}", *["-"] * (len(HEADER) - 1))
    names = ("forward_ms", "forward_tflops", "both_ms", "both_tflops", "both_peak_mib")
    formats = (".3f", ".1f", ".3f", ".1f", ".0f")
    figures = [
        format(row[name], form) if name in row else "-"
        for name, form in zip(names, formats, strict=True)
    ]
    found = dict(row["errors"])
    output = found.pop("output")
    return (row["implementation"], *figures, f"{output:.2e}", f"{max(found.values()):.2e}")


def bench(name: str, arguments: argparse.Namespace, stopwatch: Stopwatch) -> list[dict[str, Any]]:
    """All rows of one block; prints a table for each T."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if arguments.device == "cuda" else torch.float32
    block = random_block(SHAPES[name], arguments.device, dtype)
    rows = []
    compiled = prepare(IMPLEMENTATIONS["moec"], block) if "moec" in arguments.against else None
    for tokens in arguments.tokens:
        case = make_case(name, block, tokens)
        found = []
        for implementation in arguments.against:
            model = compiled
            if implementation != "moec":
                model = prepare(IMPLEMENTATIONS[implementation], block)
            found.append(measure(case, implementation, model, stopwatch))
            release(arguments.device)
        print(f"\n{title(case)}\n\n{markdown_table(HEADER, map(cells, found))}", flush=True)
        rows += found
    return rows


def title(case: Case) -> str:
    """The heading of one table."""
    shape = case.shape
    size = f"H {shape.hidden}, I {shape.intermediate}, E {shape.experts}, K {shape.top_k}"
    return f"**{case.name}** ({size}), T = {case.tokens}, {case.gradient.dtype}"


def release(device: str) -> None:
    """Give back what the last implementation held, so that it does not count against the next."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=SHAPES, default=DEFAULT_SHAPES)
    parser.add_argument(
        "--against", nargs="+", choices=IMPLEMENTATIONS, default=tuple(IMPLEMENTATIONS)
    )
    parser.add_argument("--tokens", nargs="+", type=int, help="default: 4096 16384")
    parser.add_argument("--quick", action="store_true", help="T = 4096, ten repeats")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here; --device cpu --only tiny shows the script at work")
    arguments.tokens = arguments.tokens or ([4096] if arguments.quick else [4096, 16384])
    return arguments


def main() -> None:
    """Measure and print."""
    arguments = parse_arguments()
    facts = environment(arguments.device)
    print(describe(facts), flush=True)
    stopwatch = Stopwatch(arguments.device, repeats=10 if arguments.quick else 40)
    rows = [row for name in arguments.only for row in bench(name, arguments, stopwatch)]
    write_json(arguments.json, {"environment": facts, "rows": rows})


if __name__ == "__main__":
    main()
