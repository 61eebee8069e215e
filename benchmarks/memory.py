"""Peak memory of one MoE block: what moec predicts against what PyTorch's allocator says.

Run from the project's root:

    python -m benchmarks.memory                          three blocks, ten T, 1000 routings
    python -m benchmarks.memory --allocator default      with PyTorch's default settings
    python -m benchmarks.memory --device cpu --only tiny --tokens 64 300 --routings 20

How it is measured. The blocks are transformers' own classes with random bf16 weights. `inference`
is a forward pass under no_grad, `step` a forward and a backward pass to the input and every
parameter, the output kept. Measured is `torch.cuda.max_memory_allocated` minus what was allocated
before the call: weights, input, the gradient of the output. Predicted is
`moec.memory.predict(artifact).step.at(T=...)` of the artifact that served the call. Each size is
called before it is measured, so libraries have their workspaces.

With `--allocator expandable` (the default here) an allocation takes what it asks for, rounded up to
512 bytes. PyTorch's default settings give a tensor of more than 1 MiB a block that may be up to 1
MiB larger, by what was freed before; the column `at most` counts that for every such tensor.

The routings are drawn as logits: a block's router is the identity on the first components of its
tokens. On the CPU the events of PyTorch's allocator are counted instead.
"""

import argparse
import dataclasses
import gc
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import moec
from moec.memory import Prediction, predict
from moec.memory.tracked import track
from moec.runtime.artifact import Artifact

from .hf_blocks import DEFAULT_SHAPES, SHAPES, Shape, random_block
from .report import describe, environment, markdown_table, write_json

TOKENS = (128, 257, 512, 1000, 2048, 4099, 8192, 16384, 30011, 65536)
# Sizes of the block that is routed in many ways, and of its calls.
SMALL = dataclasses.replace(SHAPES["olmoe"], hidden=256, intermediate=128)
FEW = (130, 257, 512, 1000)
TOLERANCE = 0.05
LIMITS = {"predicted": "the prediction", "at_most": "what it says at most"}


@dataclasses.dataclass
class Subject:
    """A compiled block and what its artifacts are predicted to hold."""

    name: str
    block: Any
    compiled: Any
    device: str
    predictions: dict[str, Prediction] = dataclasses.field(default_factory=dict)

    def call(self, kind: str, x: Tensor, gradient: Tensor) -> Callable[[], object]:
        """One pass or two; what it returns is kept while memory is looked at."""
        if kind == "inference":
            return lambda: self._forward(x)
        return lambda: self._step(x, gradient)

    def _forward(self, x: Tensor) -> object:
        with torch.no_grad():
            return self.compiled(x)

    def _step(self, x: Tensor, gradient: Tensor) -> object:
        output = self.compiled(x)
        output.backward(gradient)
        return output

    def forget(self, x: Tensor) -> None:
        """Give the gradients back."""
        self.block.zero_grad(set_to_none=True)
        x.grad = None

    def prediction(self, kind: str) -> Prediction:
        """Of the artifact that serves calls of a kind; there must have been one."""
        if kind not in self.predictions:
            self.predictions[kind] = predict(self._artifact(kind))
        return self.predictions[kind]

    def _artifact(self, kind: str) -> Artifact:
        mode = "inference" if kind == "inference" else "training"
        found: list[Artifact] = [
            a for r in moec.regions(self.compiled) for a in r.artifacts if a.mode == mode
        ]
        if len(found) != 1:
            raise RuntimeError(f"{self.name}: {len(found)} artifacts for {mode}, not one")
        return found[0]


def measured(subject: Subject, kind: str, x: Tensor, gradient: Tensor) -> int:
    """The peak of a call in bytes, above what was allocated before."""
    subject.forget(x)
    call = subject.call(kind, x, gradient)
    if subject.device != "cuda":
        return track(call).peak(64)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = call()
    peak = torch.cuda.max_memory_allocated() - before
    del kept
    return peak


def sized(prediction: Prediction, tokens: int) -> dict[str, int]:
    """The binding of the token dim."""
    return dict.fromkeys(prediction.step.names, tokens)


def compiled_subject(name: str, shape: Shape, device: str) -> Subject:
    """A block with random weights, compiled."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    block = random_block(shape, device, dtype)
    return Subject(name, block, moec.compile(block), device)


def arguments(subject: Subject, shape: Shape, tokens: int) -> tuple[Tensor, Tensor]:
    """Tokens that need gradients, and a gradient of the output."""
    like = subject.block.gate.weight
    x = torch.randn(1, tokens, shape.hidden, device=like.device, dtype=like.dtype)
    return x.requires_grad_(), torch.randn_like(x)


KINDS = ("inference", "step")


def rows_of(subject: Subject, shape: Shape, tokens: list[int]) -> Iterator[dict[str, Any]]:
    """A row for each kind of call and number of tokens."""
    for count, kind in itertools.product(tokens, KINDS):
        row: dict[str, Any] = {"block": subject.name, "kind": kind, "tokens": count}
        try:
            x, gradient = arguments(subject, shape, count)
            warm_up(subject, kind, x, gradient)
            real = measured(subject, kind, x, gradient)
            row |= compared(subject.prediction(kind), count, real)
            subject.forget(x)
        except torch.OutOfMemoryError:
            row["failed"] = "out of memory"
        release(subject.device)
        yield row


def warm_up(subject: Subject, kind: str, x: Tensor, gradient: Tensor) -> None:
    """Compile, and let every library have its workspace."""
    for _ in range(2):
        subject.forget(x)
        subject.call(kind, x, gradient)()


def compared(prediction: Prediction, tokens: int, real: int) -> dict[str, Any]:
    """Predicted and measured bytes."""
    sizes = sized(prediction, tokens)
    predicted = prediction.step.at(**sizes)
    return {
        "predicted": predicted,
        "at_most": prediction.step.at_most(**sizes),
        "measured": real,
        "difference": predicted / max(real, 1) - 1,
    }


HEADER = ("block", "call", "T", "predicted MiB", "at most MiB", "measured MiB", "difference")


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row as text."""
    head = (row["block"], row["kind"], str(row["tokens"]))
    if "failed" in row:
        return (*head, *["-"] * 3, row["failed"])
    sizes = (f"{row[n] / 2**20:.2f}" for n in ("predicted", "at_most", "measured"))
    return (*head, *sizes, f"{100 * row['difference']:+.3f} %")


# routings
def logits_of(kind: str, tokens: int, experts: int, generator: torch.Generator) -> Tensor:
    """Router logits ``[tokens, experts]`` whose choices are as the name says."""
    noise = torch.rand(tokens, experts, generator=generator)
    preferred = torch.randperm(experts, generator=generator)
    if kind == "zipf":
        return noise - (preferred + 1.0).log()
    if kind == "one":  # the same experts for every token
        return noise * 0.1 - preferred.float()
    if kind == "few":
        return noise - 10.0 * (preferred >= experts // 4)
    if kind == "empty":
        return noise - 10.0 * (preferred == 0)
    if kind == "turns":  # one expert after the other
        place = (torch.arange(tokens)[:, None] + preferred) % experts
        return noise * 0.1 - place.float()
    return noise


ROUTINGS = ("uniform", "zipf", "one", "few", "empty", "turns")


def identity_router(subject: Subject, experts: int) -> None:
    """Let the logits of a token be its first components."""
    with torch.no_grad():
        subject.block.gate.weight.zero_()
        subject.block.gate.weight[:, :experts].fill_diagonal_(1.0)


def routed(subject: Subject, shape: Shape, count: int) -> list[dict[str, Any]]:
    """The peaks of so many routings, each at another seed, for both kinds of call."""
    identity_router(subject, shape.experts)
    made = {tokens: arguments(subject, shape, tokens) for tokens in FEW}
    bounds = {}
    for tokens, kind in itertools.product(FEW, KINDS):
        warm_up(subject, kind, *made[tokens])
        bounds[tokens, kind] = subject.prediction(kind)
    rows = []
    for seed, (routing, tokens) in zip(
        range(count), itertools.cycle(itertools.product(ROUTINGS, FEW)), strict=False
    ):
        x, gradient = made[tokens]
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            x[0, :, : shape.experts] = logits_of(routing, tokens, shape.experts, generator).to(x)
        for kind in KINDS:
            real = measured(subject, kind, x, gradient)
            row = {"routing": routing, "kind": kind, "tokens": tokens, "seed": seed}
            rows.append(row | compared(bounds[tokens, kind], tokens, real))
    return rows


def routing_summary(rows: list[dict[str, Any]], limit: str) -> str:
    """For each routing: how many calls, the largest share of the prediction, and those above it."""
    lines = []
    for routing in ROUTINGS:
        found = [r for r in rows if r["routing"] == routing]
        share = max((r["measured"] / r[limit] for r in found), default=0.0)
        above = sum(r["measured"] > r[limit] for r in found)
        lines.append((routing, str(len(found)), f"{100 * share:.3f} %", str(above)))
    return markdown_table(("routing", "calls", "most of the prediction", "above it"), lines)


def release(device: str) -> None:
    """Give back what the last size held."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def verdict(rows: list[dict[str, Any]], routings: list[dict[str, Any]], limit: str) -> str:
    """What was asked: within 5%, and never above."""
    found = [r for r in rows if "failed" not in r]
    furthest = max((abs(r["difference"]) for r in found), default=0.0)
    above = sum(r["measured"] > r[limit] for r in [*found, *routings])
    word = "within" if furthest <= TOLERANCE else "NOT WITHIN"
    return (
        f"{len(found)} sizes: furthest from the prediction {100 * furthest:.3f} % ({word} 5 %); "
        f"with {len(routings)} routed calls, above {LIMITS[limit]}: {above}"
    )


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=SHAPES, default=DEFAULT_SHAPES)
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--routings", type=int, default=1000, help="default: 1000")
    parser.add_argument("--allocator", choices=("expandable", "default"), default="expandable")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    found = parser.parse_args()
    if found.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here; --device cpu --only tiny shows the script at work")
    return found


def main() -> None:
    """Measure and print."""
    asked, start = parse_arguments(), time.perf_counter()
    if asked.device == "cuda" and asked.allocator == "expandable":
        torch.cuda.memory._set_allocator_settings("expandable_segments:True")
    limit = "at_most" if asked.device == "cuda" and asked.allocator == "default" else "predicted"
    facts = environment(asked.device) | {"allocator": asked.allocator}
    print(describe(facts), flush=True)
    rows = []
    for name in asked.only:
        subject = compiled_subject(name, SHAPES[name], asked.device)
        found = list(rows_of(subject, SHAPES[name], asked.tokens))
        print(f"\n{markdown_table(HEADER, map(cells, found))}", flush=True)
        rows += found
        del subject
        release(asked.device)
    small = compiled_subject("routed", SMALL, asked.device)
    routings = routed(small, SMALL, asked.routings)
    print(f"\n{routing_summary(routings, limit)}\n\n{verdict(rows, routings, limit)}")
    print(f"{time.perf_counter() - start:.0f} s", flush=True)
    write_json(asked.json, {"environment": facts, "rows": rows, "routings": routings})


if __name__ == "__main__":
    main()
