"""Training under a tight memory budget and under none: losses, peaks, seconds.

    python -m benchmarks.budget_train --steps 100 --json results.json

Trains tiny models with random weights on random tokens with AdamW on the CPU, from the same weights
and on the same batches: once without a bound on memory, once with two percent more than the least
budget for which a plan was found. Peaks are those of forward and backward, with outputs and
gradients, without parameters, inputs and the optimizer's state: planned, and measured from the
events of PyTorch's allocator in one more step. A plan counts a gradient of the logits through the
whole backward pass, as there is where a loss is computed from them; where only the model's own loss
is differentiated, it is zeros that die early, and the step needs so much less. Milliseconds are
processor time of a step, the first left out, which compiles.
"""

import argparse
import copy
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import moec
from moec.compiled import model_scope_of
from moec.errors import BudgetError
from moec.memory.tracked import track

from .report import describe, environment, markdown_table, write_json

VOCABULARY = 256
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "eos_token_id": None,
    "use_cache": False,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "olmoe": {"num_hidden_layers": 4, "num_experts": 8},
    "mixtral": {"num_hidden_layers": 4, "num_local_experts": 4, "sliding_window": None},
    "granitemoehybrid": {
        "num_hidden_layers": 4,
        "layer_types": ["mamba", "mamba", "attention", "mamba"],
        "num_local_experts": 4,
        "shared_intermediate_size": 32,
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 16,
    },
}
HEADS = (
    "model",
    "losses equal",
    "first, last loss",
    "budget KiB",
    "planned KiB",
    "measured KiB",
    "ms a step",
    "extra %",
)
# Above the least budget that is known to suffice, which is that of a plan found in little time
MARGIN = 1.02


@dataclass(frozen=True)
class Run:
    """A training: its losses, budget and peaks in bytes (planned, measured), processor seconds of a
    step, and what the plan's repetitions take by its own estimate, in percent.
    """

    losses: list[float]
    budget: int
    planned: int
    measured: int
    seconds: float
    extra: float


def model_of(family: str) -> Any:
    """A tiny model with random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    settings = {**COMMON, **FAMILIES[family]}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings)).train()


def batches(steps: int, batch: int, length: int) -> list[torch.Tensor]:
    """The tokens of each step."""
    generator = torch.Generator().manual_seed(1)
    shape = (batch, length)
    return [torch.randint(VOCABULARY, shape, generator=generator) for _ in range(steps)]


def compiled(model: nn.Module, budget: int | str, seconds: float) -> Any:
    """A copy of the model with a budget."""
    options = {"plan_seconds": seconds}
    return moec.compile(copy.deepcopy(model), memory_budget=budget, options=options)


def train(model: Any, data: Sequence[torch.Tensor]) -> Run:
    """Train with AdamW; one step a batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def backward(tokens: torch.Tensor) -> Any:
        output = model(input_ids=tokens, labels=tokens)
        output.loss.backward()
        return output  # a plan counts the outputs as held to the end

    losses, start = [], time.process_time()
    for place, tokens in enumerate(data):
        losses.append(backward(tokens).loss.item())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        start = time.process_time() if place == 0 else start
    seconds = (time.process_time() - start) / max(1, len(data) - 1)
    measured = track(lambda: backward(data[-1])).peak(64)
    step = step_of(model)
    resident = step.planned.problem.resident
    peak = step.plan.peak - resident
    return Run(losses, step.budget - resident, peak, measured, seconds, step.plan.extra)


def step_of(model: nn.Module) -> Any:
    """The one step that was planned."""
    scope: Any = model_scope_of(model)
    (found,) = scope.steps.values()
    return found.step


def least_budget(model: nn.Module, tokens: torch.Tensor, seconds: float) -> int:
    """The least budget that is known to suffice, by asking for an impossible one."""
    try:
        compiled(model, 1, seconds)(input_ids=tokens, labels=tokens)
    except BudgetError as error:
        return error.least_known
    raise RuntimeError("a budget of one byte was enough")


def both(family: str, options: argparse.Namespace) -> tuple[Run, Run]:
    """The same training without a bound and within a tight one."""
    torch._dynamo.reset()
    model, data = model_of(family), batches(options.steps, options.batch, options.length)
    free = train(compiled(model, "1TiB", options.plan_seconds), data)
    budget = int(MARGIN * least_budget(model, data[0], options.plan_seconds))
    tight = train(compiled(model, budget, options.plan_seconds), data)
    return free, tight


def cells(family: str, run: Run, free: Run) -> Sequence[str]:
    """A row of the table."""
    is_free = run is free
    return (
        f"{family}, {'no budget' if is_free else 'tight'}",
        "" if is_free else "yes" if run.losses == free.losses else "no",
        f"{run.losses[0]:.6f}, {run.losses[-1]:.6f}",
        "" if is_free else f"{run.budget / 1024:.0f}",
        f"{run.planned / 1024:.0f}",
        f"{run.measured / 1024:.0f}",
        f"{1e3 * run.seconds:.0f}",
        f"{run.extra:.1f}",
    )


def main() -> int:
    """Train and print; the exit status says whether all losses were equal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--plan-seconds", type=float, default=10.0)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    facts = environment("cpu")
    print(describe(facts), flush=True)
    warnings.filterwarnings("ignore", message=".*mamba_ssm.*")
    rows, content, equal = [], {}, True
    for family in options.families.split(","):
        free, tight = both(family, options)
        equal = equal and free.losses == tight.losses
        rows += [cells(family, free, free), cells(family, tight, free)]
        content[family] = {"no budget": asdict(free), "tight": asdict(tight)}
        print("  ".join(rows[-1]), file=sys.stderr, flush=True)
    print(markdown_table(HEADS, rows))
    about = {k: v for k, v in vars(options).items() if k != "json"}
    write_json(options.json, {"environment": facts, "options": about, "runs": content})
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
