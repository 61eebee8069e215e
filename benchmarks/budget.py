"""Training under a memory budget on a real device: does the bound hold, and what does it cost?

    python -m benchmarks.budget --layers 16 --length 4096 --batch 4 --json out/budget.json

A causal model of OLMoE's shape with random weights in bf16. moec without a bound comes first. Then
budgets, evenly from its peak down to the least that is known to be feasible: planned peak, measured
peak (torch.cuda.max_memory_allocated; on the CPU the allocator's own events), under random routing
and with all tokens at the same experts, milliseconds of a step (median; forward and backward), and
whether the gradients have the same bits as without a bound (with `--deterministic`: else attention
adds in any order). Beside it, in the same run: moec's blocks with a checkpoint around every layer,
and with torch.compile's activation_memory_budget, which is a share of what it would save and no
number of bytes.

Every figure is of the step alone, with parameters and gradients in it.
"""

import argparse
import functools
import gc
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import moec
from moec.compiled import model_scope_of
from moec.errors import BudgetError
from moec.memory.tracked import track
from moec.plan import solve

from .bits import bits_of
from .report import describe, environment, markdown_table, write_json
from .timing import Stopwatch

HEADS = (
    "",
    "budget MiB",
    "planned",
    "random",
    "all to one",
    "within",
    "ms",
    "extra %",
    "same bits",
)
TORCH_SHARES = (0.8, 0.5, 0.2)
MIB = 2**20


@dataclass(frozen=True)
class Row:
    """One way to train; bytes, milliseconds, percent of modelled time."""

    name: str
    budget: int | None
    planned: int | None
    measured: int
    adversarial: int
    milliseconds: float
    extra: float | None = None
    same_bits: bool | None = None

    @property
    def within(self) -> bool | None:
        """Whether no measured peak is above the budget."""
        if self.budget is None:
            return None
        return max(self.measured, self.adversarial) <= self.budget

    def cells(self) -> Sequence[str]:
        """The row of the table."""

        def mib(size: int | None) -> str:
            return "-" if size is None else f"{size / MIB:.1f}"

        sizes = [mib(s) for s in (self.budget, self.planned, self.measured, self.adversarial)]
        flags = ["-" if f is None else "yes" if f else "NO" for f in (self.within, self.same_bits)]
        extra = "-" if self.extra is None else f"{self.extra:.2f}"
        return (self.name, *sizes, flags[0], f"{self.milliseconds:.1f}", extra, flags[1])


class Bench:
    """A model on a device, and how steps of it are measured."""

    def __init__(self, options: argparse.Namespace) -> None:
        from transformers import OlmoeConfig, OlmoeForCausalLM

        sizes = {"num_hidden_layers": options.layers, "intermediate_size": 1024}
        if options.small:
            sizes |= {"hidden_size": 64, "intermediate_size": 32, "num_experts": 8}
            sizes |= {"num_experts_per_tok": 2, "vocab_size": 512}
            sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4}
        config = OlmoeConfig(**sizes, use_cache=False, eos_token_id=None, pad_token_id=None)
        dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
        torch.manual_seed(0)
        with torch.device(options.device):
            self.model = OlmoeForCausalLM(config).to(dtype).train()
        shape = (options.batch, options.length)
        tokens = torch.randint(0, config.vocab_size, shape, device=options.device)
        self.inputs = {"input_ids": tokens, "labels": tokens}
        self.device, self.repeats, self.seconds = options.device, options.repeats, options.seconds
        self.routers = [layer.mlp.gate for layer in self.model.model.layers]

    def step(self, model: nn.Module) -> Any:
        """Forward and backward."""
        output = model(**self.inputs)
        output.loss.backward()
        return output

    def gradients(self, model: nn.Module) -> list[int]:
        """A number for the bits of each gradient of one step."""
        self.model.zero_grad()
        self.step(model)
        return [bits_of(p.grad) for p in self.model.parameters() if p.grad is not None]

    def peak(self, model: nn.Module) -> int:
        """The most that is allocated in a step, parameters and inputs included."""
        self.model.zero_grad()
        gc.collect()
        if self.device == "cpu":
            owned = [*self.model.parameters(), *self.model.buffers(), *self.inputs.values()]
            held = sum(t.nbytes for t in {t.data_ptr(): t for t in owned}.values())
            return int(held + track(lambda: self.step(model)).peak(64))
        torch.cuda.reset_peak_memory_stats()
        self.step(model)
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated())

    def adversarial_peak(self, model: nn.Module) -> int:
        """The same where all tokens go to the same experts."""
        # what is kept of them must not count: not on the device
        weights = [router.weight.detach().to("cpu", copy=True) for router in self.routers]
        with torch.no_grad():
            for router in self.routers:
                router.weight.zero_()
        found = self.peak(model)
        with torch.no_grad():
            for router, weight in zip(self.routers, weights, strict=True):
                router.weight.copy_(weight)
        return found

    def milliseconds(self, model: nn.Module) -> float:
        """The median of a step."""
        clock = Stopwatch(self.device, 1, warm_up=0)

        def once() -> float:
            self.model.zero_grad()
            return clock.once(lambda: self.step(model))

        return statistics.median([once() for _ in range(self.repeats + 2)][2:])

    def row(self, name: str, model: nn.Module, **about: Any) -> Row:
        """All of one way."""
        self.peak(model)  # compiles
        settings = {"budget": None, "planned": None, **about}
        peaks = self.peak(model), self.adversarial_peak(model)
        return Row(name, **settings, measured=peaks[0], adversarial=peaks[1],
                   milliseconds=self.milliseconds(model))  # fmt: skip


def planned_rows(bench: Bench, count: int, which: Sequence[int]) -> Iterator[Row]:
    """moec without a bound, then with those of ``count`` budgets, down to the least known, that are
    asked for by their numbers from 1 on.
    """
    torch._dynamo.reset()
    free = planned(bench, 1 << 50)
    with told("captured, compiled"):
        bench.peak(free)
    reference = bench.gradients(free)
    step = _step(free)
    top = step.plan.peak
    bits = bench.gradients(free) == reference
    yield bench.row("moec, no bound", free, planned=top, extra=0.0, same_bits=bits)
    with told("least budget found"):
        least = least_budget(step)
    for number in which:
        budget = int(top - (top - least) * number / count)
        torch._dynamo.reset()
        model = planned(bench, budget)
        with told(f"captured, planned and compiled for {100 * budget / top:.0f}%"):
            bench.peak(model)
        bits = bench.gradients(model) == reference
        plan = _step(model).plan
        about = {"budget": budget, "planned": plan.peak, "extra": plan.extra, "same_bits": bits}
        yield bench.row(f"moec {100 * budget / top:.0f}%", model, **about)


@contextmanager
def told(what: str) -> Iterator[None]:
    """Say on stderr how long something took."""
    start = time.perf_counter()
    yield
    print(f"{what}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)


def planned(bench: Bench, budget: int) -> nn.Module:
    """The model with a budget."""
    options = {"plan_seconds": bench.seconds}
    model: nn.Module = moec.compile(bench.model, memory_budget=budget, options=options)
    return model


def least_budget(step: Any) -> int:
    """The least budget in bytes that is known to be feasible."""
    try:
        solve(step.planned.problem, 1, time_limit=step.time_limit)
    except BudgetError as error:
        return error.least_known
    return 1


def _step(model: nn.Module) -> Any:
    scope: Any = model_scope_of(model)
    return next(iter(scope.steps.values())).step


def checkpointed_row(bench: Bench) -> Row:
    """moec's blocks, with a checkpoint around every layer."""
    bench.model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        return bench.row("checkpoint each layer", moec.compile(bench.model))
    finally:
        bench.model.gradient_checkpointing_disable()


def torch_row(bench: Bench, share: float) -> Row:
    """moec in torch.compile (blocks, causal attention), with a budget of torch's own."""
    import torch._functorch.config as functorch_config

    torch._dynamo.reset()
    with functorch_config.patch(activation_memory_budget=share):
        model: Any = torch.compile(moec.compile(bench.model), backend="moec")
        return bench.row(f"torch.compile {share}", model)


def tried(make: Callable[[], Row], name: str) -> Row | None:
    """A row, or nothing with a line that says why."""
    try:
        return make()
    except (RuntimeError, torch.OutOfMemoryError) as error:
        print(f"{name}: {str(error).splitlines()[0][:120]}", flush=True)
        return None


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--budgets", type=int, default=10, help="how many")
    parser.add_argument("--which", type=int, nargs="+", help="of them, 1 the largest; all")
    parser.add_argument("--seconds", type=float, default=10.0, help="of planning, each")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="widths for a CPU")
    parser.add_argument("--shares", type=float, nargs="*", default=TORCH_SHARES, help="of torch")
    parser.add_argument(
        "--deterministic", action="store_true", help="attention without its atomic additions"
    )
    parser.add_argument("--alone", action="store_true", help="leave out torch.compile")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.use_deterministic_algorithms(options.deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    facts = environment(options.device)
    print(describe(facts), flush=True)
    bench = Bench(options)
    rows = []
    start = time.perf_counter()
    which = options.which or range(1, options.budgets + 1)
    for row in planned_rows(bench, options.budgets, which):
        print(f"{time.perf_counter() - start:4.0f} s: " + " | ".join(row.cells()), flush=True)
        rows.append(row)
    write_json(options.json, {"environment": facts, "rows": [asdict(row) for row in rows]})
    found = [tried(lambda: checkpointed_row(bench), "checkpoint")]
    for share in () if options.alone else options.shares:
        found.append(tried(functools.partial(torch_row, bench, share), f"torch.compile {share}"))
    rows += [row for row in found if row is not None]
    print(markdown_table(HEADS, (row.cells() for row in rows)))
    write_json(options.json, {"environment": facts, "rows": [asdict(row) for row in rows]})


if __name__ == "__main__":
    main()
