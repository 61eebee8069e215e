"""Two hundred numbers of tokens from 0 to 131,072, eager and compiled: one compilation serves all.

Run from the project's root:

    python -m benchmarks.token_counts                           five families, 200 counts
    python -m benchmarks.token_counts --only olmoe --counts 12

The counts are powers of two and their neighbours, edges of tiles and theirs, primes, and numbers
drawn at random. The tiny models of tests/models.py run in inference, and forward and backward in
training, on the CPU in float32, in four ways:

    model    the compiled model as it is
    block    its first MoE block under torch.compile, with unbacked sizes: one graph for all counts
    graph    the whole compiled model under torch.compile, in the same way
    dynamic  the same under torch.compile(dynamic=True) without marks, batches and lengths from 2 on

Each is compared with eager at every count. All calls but the first of each mode run under
torch.compiler.set_stance("fail_on_recompile"), and moec must not compile anything then either.
Errors are relative to the largest element of a tensor. Where eager and compiled differ by more than
1e-5, float64 decides: a value that lies on the limit of a clamp but for rounding has a gradient on
one side only. Such calls are listed with the errors of both. Exit status 1: an error above 1e-5, or
a second compilation.

No whole model of these families takes zero tokens, eager or not, so 0 is asked of blocks. The whole
graph needs code of transformers that does not ask whether a size is 1: attn_implementation="eager",
and a mask.
"""

import argparse
import copy
import math
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.decorators import mark_unbacked

import moec
from tests.models import FAMILIES, VOCABULARY, build, relative_error

from .report import describe, environment, markdown_table, write_json

MOST = 131_072
LONGEST = 32  # of a sequence; more tokens are more sequences
LIMIT = 1e-5
# What is zero but for rounding, as a share of the largest gradient.
NOISE = 1e-6
TILES = (16, 32, 64, 128, 256)
# The largest prime below each power of two, and some between.
PRIMES = (
    *(3, 7, 13, 31, 61, 127, 251, 509, 1021, 2039, 4093, 8191, 16_381, 32_749, 65_521, 131_071),
    *(11, 101, 211, 401, 1_009, 3_001, 7_919, 10_007, 20_011, 50_021, 104_729),
)
SHORT = (0, 1, 2, 7, 31, 33, 64, 127, 129, 1021, 4096, 8193)
WAYS = ("model", "block", "graph", "dynamic")
HEADER = (
    "family, way",
    "calls",
    "result",
    "gradient",
    "worst at",
    "compiled by the first inference",
    "and by the first training",
    "compiled later",
    "decided by float64",
)
FIRST = 66  # tokens of the first call of a mode
Results = dict[str, Any]


def token_counts(wanted: int = 200) -> list[int]:
    """Counts from 0 to 131,072 that a wrong bound, tile or width would show at."""
    powers = [2**n + d for n in range(18) for d in (-1, 0, 1)]
    edges = [tile * tiles + d for tile in TILES for tiles in (3, 7, 100) for d in (-1, 0, 1)]
    known = sorted({n for n in (*SHORT, *powers, *edges, *PRIMES) if n <= MOST})
    drawn = random.Random(0)
    found = set(SHORT if wanted <= len(SHORT) else known)
    while len(found) < wanted:
        found.add(round(2 ** drawn.uniform(1, 17)))
    return sorted(found)[:wanted]


def split(count: int) -> tuple[int, int]:
    """Batch and length of so many tokens: the longest sequences that divide them."""
    if not count:
        return 0, 5
    length = next(s for s in range(min(count, LONGEST), 0, -1) if count % s == 0)
    return count // length, length


@dataclass
class Outcome:
    """What one way of running a family showed: worst errors, and what was compiled when."""

    family: str
    way: str
    calls: int = 0
    result: float = 0.0
    gradient: float = 0.0
    worst: str = ""
    compiled: dict[str, str] = field(default_factory=dict)
    again: list[str] = field(default_factory=list)
    decided: list[str] = field(default_factory=list)

    @property
    def is_well(self) -> bool:
        """Whether everything was equal, and compiled once."""
        return max(self.result, self.gradient) <= LIMIT and not self.again

    def note(self, about: str, result: float, gradient: float) -> None:
        """Keep the worst errors of a call."""
        if max(result, gradient) > max(self.result, self.gradient):
            self.worst = about
        self.result, self.gradient = max(self.result, result), max(self.gradient, gradient)
        self.calls += 1


def errors(ours: Results, eager: Results) -> tuple[float, float]:
    """The errors of the result, and of the worst gradient."""
    result = relative_error(ours["result"], eager["result"]) if ours["result"].numel() else 0.0
    return result, gradient_error(ours, eager)


def gradient_error(ours: Results, eager: Results) -> float:
    """The worst error of a gradient, relative to its own largest element.

    A gradient that is zero but for rounding has to be as small in both; without tokens eager has
    none where ours are zeros.
    """
    names = [n for n in {**ours, **eager} if n != "result"]
    largest = {n: _largest(eager.get(n)) for n in names}
    noise = NOISE * max(largest.values(), default=0.0)
    return max((_error(ours.get(n), eager.get(n), largest[n], noise) for n in names), default=0.0)


def _error(ours: Tensor | None, eager: Tensor | None, largest: float, noise: float) -> float:
    if largest <= noise:
        return 0.0 if _largest(ours) <= noise else math.inf
    return math.inf if ours is None or eager is None else relative_error(ours, eager)


def _largest(tensor: Tensor | None) -> float:
    return 0.0 if tensor is None or not tensor.numel() else tensor.abs().max().item()


@dataclass(frozen=True)
class Subject:
    """A family's model, eager and compiled, in one way of running it."""

    family: str
    way: str
    eager: Any
    compiled: Any

    @property
    def block(self) -> str:
        """The path of the first MoE block."""
        return str(moec.regions(self.compiled)[0].name)

    def caller(self, backend: str) -> Callable[..., Any]:
        """What is called in the place of the eager code."""
        if self.way == "model":
            return self.compiled  # type: ignore[no-any-return]
        part = self.compiled.get_submodule(self.block) if self.way == "block" else self.compiled
        free = True if self.way == "dynamic" else None
        return torch.compile(part, fullgraph=True, dynamic=free, backend=backend)

    def given(
        self, count: int, training: bool, dtype: torch.dtype = torch.float32
    ) -> dict[str, Any]:
        """The arguments of a call with so many tokens."""
        shape, generator = split(count), torch.Generator().manual_seed(count)
        if self.is_block(count):
            x = torch.randn(*shape, self.eager.config.hidden_size, generator=generator)
            return {"hidden_states": self._marked(x.to(dtype).requires_grad_(training))}
        ids = self._marked(torch.randint(3, VOCABULARY, shape, generator=generator))
        mask = {"attention_mask": self._marked(torch.ones_like(ids))} if self.way == "graph" else {}
        return {"input_ids": ids, "use_cache": False, **mask}

    def takes(self, count: int) -> bool:
        """Whether there are calls of so many tokens in this way."""
        least = {"graph": 1, "dynamic": 2}.get(self.way, 0)
        return min(split(count)) >= least

    def is_block(self, count: int) -> bool:
        """Whether so many tokens go to a block alone."""
        return self.way == "block" or not count

    def part(self, whole: Any, count: int) -> Any:
        """What is called with so many tokens, of the whole model."""
        return whole.get_submodule(self.block) if self.is_block(count) else whole

    def expected(self, count: int, training: bool, dtype: torch.dtype = torch.float32) -> Results:
        """What eager gives for so many tokens."""
        model = self.eager if dtype is torch.float32 else copy.deepcopy(self.eager).to(dtype)
        given = self.given(count, training, dtype)
        return step(self.part(model, count), model, given, count)

    def _marked(self, tensor: Tensor) -> Tensor:
        if self.way in ("block", "graph"):
            for axis, name in enumerate("BS"):
                mark_unbacked(tensor, axis, shape_id=name)
        return tensor


def step(call: Callable[..., Any], model: nn.Module, given: dict[str, Any], seed: int) -> Results:
    """The first result of a call, and the gradients of a sum that weighs its elements differently,
    where there are any.
    """
    output = call(**given)
    result = output if isinstance(output, Tensor) else output[0]
    if not result.requires_grad:
        return {"result": result}
    generator = torch.Generator().manual_seed(seed)
    (result * torch.randn(result.shape, generator=generator)).sum().backward()
    leaves = {**dict(model.named_parameters()), **given}
    found = {n: t.grad for n, t in leaves.items() if getattr(t, "grad", None) is not None}
    for leaf in leaves.values():
        if isinstance(leaf, Tensor):
            leaf.grad = None
    return {"result": result.detach(), **found}


def compiled_so_far(compiled: nn.Module) -> str:
    """What moec has made for a model, and how many graphs torch.compile has."""
    session = moec.regions(compiled)[0].session
    modes = ", ".join(c.mode for c in moec.history(compiled))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return f"{len(session.captures)} captures, {len(session.artifacts)} artifacts ({modes})" + (
        f", {graphs} graphs" if graphs else ""
    )


def measure(family: str, way: str, counts: Sequence[int], backend: str) -> Outcome:
    """One family at all counts, for inference and in training."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = build(family, **({"attn_implementation": "eager"} if way == "graph" else {}))
    subject = Subject(family, way, model, moec.compile(model))
    outcome = Outcome(family, way)
    for training in (False, True):
        model.train(training)
        subject.compiled.train(training)
        with torch.set_grad_enabled(training):
            _at_all_counts(subject, outcome, counts, training, backend)
    return outcome


def _at_all_counts(
    subject: Subject, outcome: Outcome, counts: Sequence[int], training: bool, backend: str
) -> None:
    mode = "training" if training else "inference"
    call = subject.caller(backend)
    _compare(subject, outcome, call, FIRST, training)
    outcome.compiled[mode] = compiled_so_far(subject.compiled)
    with torch.compiler.set_stance("fail_on_recompile"):
        for count in counts:
            if not subject.takes(count):
                continue
            _compare(subject, outcome, call, count, training)
            now = compiled_so_far(subject.compiled)
            if now != outcome.compiled[mode]:
                outcome.again.append(f"{mode}, {count} tokens: {now}")
                outcome.compiled[mode] = now


def _compare(
    subject: Subject, outcome: Outcome, call: Callable[..., Any], count: int, training: bool
) -> None:
    about = f"{count} tokens, {'training' if training else 'inference'}"
    called = call if subject.way != "model" else subject.part(subject.compiled, count)
    ours = step(called, subject.compiled, subject.given(count, training), count)
    eager = subject.expected(count, training)
    found = errors(ours, eager)
    if max(found) > LIMIT:
        exact = subject.expected(count, training, torch.float64)
        found, theirs = errors(ours, exact), errors(eager, exact)
        said = f"compiled is {max(found):.1e} from float64, eager {max(theirs):.1e}"
        outcome.decided.append(f"{about}: {said}")
    outcome.note(about, *found)


def cells(outcome: Outcome) -> tuple[str, ...]:
    """A row of figures as text."""
    return (
        f"{outcome.family}, {outcome.way}",
        str(outcome.calls),
        f"{outcome.result:.1e}",
        f"{outcome.gradient:.1e}",
        outcome.worst,
        *outcome.compiled.values(),
        "; ".join(outcome.again) or "none",
        "; ".join(outcome.decided),
    )


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=list(FAMILIES), action="append")
    parser.add_argument("--way", choices=WAYS, action="append")
    parser.add_argument("--counts", type=int, default=200, help="how many numbers of tokens")
    parser.add_argument("--backend", default="aot_eager", help="of torch.compile")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    facts = environment("cpu")
    counts = token_counts(arguments.counts)
    print(f"{describe(facts)}\n{len(counts)} counts from {counts[0]} to {counts[-1]}", flush=True)
    outcomes = []
    for way in arguments.way or WAYS:
        for family in arguments.only or FAMILIES:
            outcomes.append(measure(family, way, counts, arguments.backend))
            print("  ".join(cells(outcomes[-1])), flush=True)
    print(markdown_table(HEADER, map(cells, outcomes)), flush=True)
    rows = [vars(o) for o in outcomes]
    write_json(arguments.json, {"environment": facts, "counts": counts, "rows": rows})
    return int(not all(o.is_well for o in outcomes))


if __name__ == "__main__":
    sys.exit(main())
