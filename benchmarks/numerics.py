"""Errors and bits of a training step of one MoE block, at many sizes and routings.

    python -m benchmarks.numerics --json out/numerics.json
    python -m benchmarks.numerics --only s7b-n256 --routings random one --runs 5
    python -m benchmarks.numerics --device cpu --only tiny         the script at work, anywhere

The blocks and sizes are those of benchmarks.train, with fewer tokens. Errors of the output and of
each gradient are relative, in norm, to float64; beside moec's are those of eager experts, in the
same number format. Before every run the allocator's free memory is filled with NaN, so that what a
kernel leaves unwritten shows. Inputs are drawn so that rounding cannot change the routing, which is
random, skewed (zipf), with half of the experts empty, or all tokens to the same experts. Gradients
of the weights are of three experts; those of an expert without tokens must be zero.

`same bits` says in how many of `--runs` runs output and gradients had the bits of the first. With
numerics "repro" one token is computed alone, as one of 7 and as one of 4096: `repro` says whether
its output and its gradient have the same bits each time.
"""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import moec

from .bits import bits_of
from .hf_blocks import LOGIT_MARGIN, random_block
from .reference import Result, Weights, clear_choices, reference, relative_error
from .report import describe, environment, markdown_table, write_json
from .train_step import MODELS, NAMES, SIZES, Size

ROUTINGS = ("random", "zipf", "half empty", "one")
TOKENS = 2048
TOGETHER = (1, 7, 4096)  # tokens of a call with numerics "repro"
FAR = 20.0  # what is added to logits to decide a choice
POISON = 1 << 28  # numbers of NaN that free memory is filled with
HEADS = ("size", "routing", "worst error", "eager's there", "most times eager's", "same bits")


@dataclass(frozen=True)
class Case:
    """A block, an input [1, T, H] and the gradient of its output."""

    block: Any
    size: Size
    hidden: Tensor
    gradient: Tensor

    @property
    def kept(self) -> set[int]:
        """The experts whose weights' gradients are compared."""
        return {0, self.size.experts // 2, self.size.experts - 1}

    def results(self, model: Any) -> dict[str, Tensor]:
        """Output and gradients by name, in memory that was full of NaN."""
        poison(self.hidden.device)
        leaf = self.hidden.clone().requires_grad_()
        output = model(leaf)
        parameters = [self.block.get_parameter(name) for name in NAMES]
        found = torch.autograd.grad(output, [leaf, *parameters], self.gradient)
        return {"output": output.detach(), **dict(zip(("hidden", *NAMES), found, strict=True))}

    def expected(self) -> Result:
        """The same in float64."""
        experts = self.block.experts
        return reference(
            Weights(self.block.gate.weight, experts.gate_up_proj, experts.down_proj),
            self.hidden[0],
            self.gradient[0],
            top_k=self.size.top_k,
            normalise=False,
            activation=experts.act_fn,
            kept=self.kept,
        )


def poison(device: torch.device) -> None:
    """Leave NaN in the memory that the allocator gives out next."""
    if device.type == "cuda":
        sizes = (POISON, *(POISON >> shift for shift in range(4, 28, 2)))
        filled = [torch.full((size,), torch.nan, device=device) for size in sizes]
        del filled


def drawn(size: Size, routing: str, device: str, dtype: torch.dtype) -> Case:
    """A block with random weights, and an input on which every implementation routes alike."""
    torch.manual_seed(0)
    block = random_block(size.shape, device, dtype)
    weight = block.gate.weight.detach()
    ranks = torch.arange(1, size.experts + 1, device=device)
    shifts = {
        "zipf": -ranks.log(),
        "half empty": -FAR * (ranks > (size.experts + 1) // 2),
        "one": FAR * (ranks <= size.top_k),
    }
    if routing in shifts:
        weight[:, 0] = shifts[routing].to(dtype)
    found = list[Tensor]()
    while sum(map(len, found)) < size.tokens:
        rows = torch.randn(size.tokens, size.hidden, device=device, dtype=dtype)
        rows[:, 0] = 1
        found.append(clear_choices(weight, rows, size.top_k, LOGIT_MARGIN))
    hidden = torch.cat(found)[: size.tokens][None]
    return Case(block, size, hidden, torch.randn_like(hidden))


def errors(actual: dict[str, Tensor], expected: Result) -> dict[str, float]:
    """Relative errors by name; infinite where what must be zero is not."""

    def of(value: Tensor, wanted: Tensor) -> float:
        if not wanted.any():
            return float("inf") if value.any() else 0.0
        return relative_error(value, wanted)

    found = {
        "output": of(actual["output"][0], expected.output),
        "hidden": of(actual["hidden"][0], expected.hidden),
        "router": of(actual[NAMES[0]], expected.router),
    }
    for name, wanted in zip(NAMES[1:], (expected.gate_up, expected.down), strict=True):
        found[name] = max(of(actual[name][e], value) for e, value in wanted.items())
    return found


def compared(case: Case, runs: int) -> dict[str, Any]:
    """Errors of moec and of eager experts, and how many runs have equal bits."""
    expected = case.expected()
    found = {}
    for name in ("moec", "eager"):
        found[name] = errors(case.results(MODELS[name](case.block)), expected)
    model = MODELS["moec"](case.block)
    bits = [[bits_of(t) for t in case.results(model).values()] for _ in range(runs)]
    return {"errors": found, "same_bits": sum(b == bits[0] for b in bits), "runs": runs}


def is_repeated(case: Case) -> bool:
    """Whether a token has the same bits in every company, under numerics "repro"."""
    model = moec.compile(case.block, options={"numerics": "repro"})
    found = set()
    for count in TOGETHER:
        some = replace(case, hidden=case.hidden[:, :count], gradient=case.gradient[:, :count])
        results = some.results(model)
        found.add(tuple(bits_of(results[name][0, 0]) for name in ("output", "hidden")))
    return len(found) == 1


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table."""
    ours, eager = row["errors"]["moec"], row["errors"]["eager"]
    times = {name: error / max(eager[name], 1e-30) for name, error in ours.items()}
    worst, most = max(ours, key=ours.__getitem__), max(times, key=times.__getitem__)
    shown = (f"{ours[worst]:.2e} ({worst})", f"{eager[worst]:.2e}", f"{times[most]:.2f} ({most})")
    return (row["size"], row["routing"], *shown, f"{row['same_bits']} of {row['runs']}")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = [n for n, s in SIZES.items() if not s.zipf]
    parser.add_argument("--only", nargs="+", choices=sizes)
    parser.add_argument("--routings", nargs="+", choices=ROUTINGS, default=list(ROUTINGS))
    parser.add_argument("--runs", type=int, default=100, help="of which the bits are compared")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here; --device cpu --only tiny shows the script at work")
    arguments.only = arguments.only or [n for n in sizes if n != "tiny"]
    return arguments


def main() -> None:
    """Compare and print."""
    arguments = parse_arguments()
    dtype = torch.bfloat16 if arguments.device == "cuda" else torch.float32
    facts = environment(arguments.device)
    print(describe(facts), flush=True)
    rows = list[dict[str, Any]]()
    repro = dict[str, bool]()
    for name in arguments.only:
        size = replace(SIZES[name], tokens=min(SIZES[name].tokens, TOKENS))
        for routing in arguments.routings:
            case = drawn(size, routing, arguments.device, dtype)
            about = {"size": name, "routing": routing}
            rows.append(about | compared(case, arguments.runs))
            print(" | ".join(cells(rows[-1])), flush=True)
        if arguments.device == "cuda":  # numerics "repro" needs emitted kernels
            many = drawn(replace(size, tokens=max(TOGETHER)), "random", arguments.device, dtype)
            repro[name] = is_repeated(many)
            print(f"{name}: repro {'yes' if repro[name] else 'NO'}", flush=True)
        write_json(arguments.json, {"environment": facts, "rows": rows, "repro": repro})
    print(f"\n{markdown_table(HEADS, map(cells, rows))}")


if __name__ == "__main__":
    main()
