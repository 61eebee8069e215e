"""One process of tests/test_distributed_budget.py: ``python tests/distributed_budget.py RANK
FOLDER``.

Trains tiny models of which steps are planned under a memory budget, in two processes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import moec
from moec.compiled import model_scope_of
from moec.errors import CompileError
from tests.distributed import STEPS, WORLD, loss_of
from tests.models import build, tokens

ROWS, LENGTH = 3, 40
LAYERS = 2
# With it some operations of a layer run again
BUDGET = "1.16MiB"


def small() -> Any:
    """A model in float64, in which another order of additions does not show."""
    return build("olmoe", num_hidden_layers=LAYERS).double()


def planned(module: Any) -> Any:
    """With a budget, planned in little time; room is kept for gradients that are added to."""
    grads = sum(p.numel() * p.element_size() for p in module.parameters())
    options = {"plan_seconds": 1, "reserve": grads, "count_others": False}
    return moec.compile(module, memory_budget=BUDGET, options=options)


def half(rank: int, number: int) -> dict[str, torch.Tensor]:
    """The rows of one process in one of the two batches of a step."""
    rows = tokens(2 * ROWS * WORLD, LENGTH)
    first = ROWS * (2 * rank + number)
    return {name: value[first : first + ROWS] for name, value in rows.items()}


def train(model: nn.Module, ranks: list[int]) -> list[float]:
    """Losses of a few steps, each on the gradients of two batches of each rank."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    found = []
    for _ in range(STEPS):
        total = torch.zeros((), dtype=torch.float64)
        for rank in ranks:
            for number in range(2):
                loss = loss_of(model, half(rank, number)) / len(ranks)
                loss.backward()  # type: ignore[no-untyped-call]
                total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        if len(ranks) == 1:
            dist.all_reduce(total)
            total /= WORLD
        found.append(total.item())
    return found


def extras(model: nn.Module) -> list[float]:
    """The extra time of each plan of a model or its parts, in percent."""
    scopes: list[Any] = [model_scope_of(m) for m in model.modules()]
    return [c.step.plan.extra for s in scopes if s is not None for c in s.steps.values()]


def in_parts() -> Any:
    """A model of which each layer has a budget and is sharded, and then the rest."""
    model = small()
    for place, layer in enumerate(model.model.layers):
        model.model.layers[place] = fully_shard(planned(layer))
    return fully_shard(model)


def refusal() -> str:
    """What a budget for the whole of a model says whose layers are sharded."""
    model = planned(small())
    for layer in model.model.layers:
        fully_shard(layer)
    try:
        loss_of(fully_shard(model), half(0, 0))
    except CompileError as error:
        return str(error)
    return "not refused"


def main() -> None:
    """Train in every way and write what was found to FOLDER/RANK.json."""
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=WORLD)
    model = in_parts()
    found = {"refusal": refusal(), "losses": train(model, [rank]), "extras": extras(model)}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
