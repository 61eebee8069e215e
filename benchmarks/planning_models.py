"""Plans of training steps of whole models: extra time, bound, gap, seconds.

    python -m benchmarks.planning_models --only olmoe --shares 80 60 --time-limit 5

The step of a model with the published widths is captured without running it (bfloat16, one sequence
of 4096 tokens, for a GPU), and planned within several budgets. A share of 0% is what the caller
holds at the end of the step anyway (parameters, gradients, what the model returns), 100% the peak
of the step as it was captured; "least" is the least budget for which a plan was found in the same
time. Gaps are in points of the step's time. "within 1%" is when the total time of the best plan was
first within 1% of the final one. Every plan is replayed.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from moec.budget.model_plan import CapturedModel, ModelStep, capture_model
from moec.capture.model_spec import load_layers
from moec.errors import BudgetError

from .planning import near_final
from .report import describe, environment, markdown_table, write_json

MODELS: dict[str, dict[str, Any]] = {
    "olmoe": {"intermediate_size": 1024, "num_hidden_layers": 16},
    "qwen3_moe": {
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "vocab_size": 151936,
    },
}
HEADS = ("model, operations", "share", "GiB", "extra ms", "extra %", "gap", "within 1% (s)")


@dataclass(frozen=True)
class Row:
    """A model at one budget; times in milliseconds, percent of the step, points, seconds."""

    model: str
    operations: int
    share: str
    budget: int
    extra_ms: float | None = None
    extra: float | None = None
    gap: float | None = None
    near: float | None = None

    def cells(self) -> tuple[str, ...]:
        """The row of the table."""
        figures = (self.extra_ms, self.extra, self.gap, self.near)
        shown = ("-" if f is None else f"{f:.3f}" for f in figures)
        return (
            f"{self.model}, {self.operations}",
            self.share,
            f"{self.budget / 2**30:.3f}",
            *shown,
        )


def captured(name: str, layers: int | None, tokens: int) -> CapturedModel:
    """The step of a model with published widths; ``layers`` instead of all."""
    sizes = MODELS[name] | ({} if layers is None else {"num_hidden_layers": layers})
    with tempfile.TemporaryDirectory() as folder:
        AutoConfig.for_model(name, **sizes).save_pretrained(folder)
        model = load_layers(folder, torch.bfloat16).model
    return capture_model(model, 1, tokens, "triton")


def rows_of(name: str, step: ModelStep, shares: list[float], seconds: float) -> Iterator[Row]:
    """One row a budget, then the least that is known to be feasible."""
    problem = step.planned.problem
    kept = (
        size
        for node in problem.nodes
        for size, is_kept in zip(node.outputs, node.keep, strict=True)
        if is_kept
    )
    floor, peak, count = problem.resident + sum(kept), step.unplanned.peak, len(problem.nodes)
    least = None
    for share in shares:
        budget = int(floor + share / 100 * (peak - floor))
        text = f"{share:g}%"
        try:
            plan = step.solved(budget, seconds)
        except BudgetError as error:
            least = error.least_known
            yield Row(name, count, text, budget)
            continue
        step.known.append(plan.sequence)  # where the search for the least begins
        extra = 1e3 * (plan.time - plan.least_time)
        yield Row(name, count, text, budget, extra, plan.extra, plan.gap, near_final(plan))
    if least is None:
        try:
            step.solved(1, seconds)
        except BudgetError as error:
            least = error.least_known
    if least is not None:
        yield Row(name, count, f"least: {100 * (least - floor) / (peak - floor):.1f}%", least)


def main() -> None:
    """Capture, plan, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--layers", type=int, help="fewer than all")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--shares", type=float, nargs="+", default=[90, 80, 70, 60, 50, 40, 30])
    parser.add_argument("--time-limit", type=float, default=5.0)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    facts = environment("cpu")
    print(describe(facts), flush=True)
    rows = []
    for name in options.only:
        start = time.perf_counter()
        step = captured(name, options.layers, options.tokens).at(options.tokens)
        print(f"{name}: captured in {time.perf_counter() - start:.0f} s", flush=True)
        for row in rows_of(name, step, options.shares, options.time_limit):
            rows.append(row)
            print("  ".join(row.cells()), flush=True)
    print(f"\n{markdown_table(HEADS, (row.cells() for row in rows))}")
    write_json(options.json, {"environment": facts, "rows": [asdict(row) for row in rows]})


if __name__ == "__main__":
    main()
