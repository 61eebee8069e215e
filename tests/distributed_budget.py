"""One process of tests/test_distributed_budget.py: ``python tests/distributed_budget.py RANK
FOLDER``.

Trains tiny models of which steps are planned under a memory budget, in two processes.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import moec
from moec.compiled import model_scope_of
from moec.errors import CompileError
from tests.distributed import STEPS, WORLD, loss_of
from tests.models import build, tokens

ROWS, LENGTH = 3, 40
# Budgets that need some operations to run again, of a whole model of one layer and of a layer
WHOLE, LAYER = "1.55MiB", "1.16MiB"


def model_of(layers: int) -> Any:
    """A model in float64, in which another order of additions does not show."""
    return build("olmoe", num_hidden_layers=layers).double()


def planned(module: Any, budget: str) -> Any:
    """With a budget, planned in little time; room is kept for gradients that are added to."""
    grads = sum(p.numel() * p.element_size() for p in module.parameters())
    options = {"plan_seconds": 1, "reserve": grads, "count_others": False}
    return moec.compile(module, memory_budget=budget, options=options)


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
                with _unsynchronised(model, number == 0):
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


def _unsynchronised(model: nn.Module, wanted: bool) -> Any:
    is_ddp = isinstance(model, DistributedDataParallel)
    return model.no_sync() if wanted and is_ddp else contextlib.nullcontext()


def extras(model: nn.Module) -> list[float]:
    """The extra time of each plan of a model or its parts, in percent."""
    scopes: list[Any] = [model_scope_of(m) for m in model.modules()]
    return [c.step.plan.extra for s in scopes if s is not None for c in s.steps.values()]


def in_parts(budget: str) -> Any:
    """A model of two layers, each with a budget and sharded, and then the rest."""
    model = model_of(2)
    for place, layer in enumerate(model.model.layers):
        model.model.layers[place] = fully_shard(planned(layer, budget))
    return fully_shard(model)


def refusal() -> str:
    """What a budget for the whole of a model says whose layers are sharded."""
    model = planned(model_of(2), WHOLE)
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
    ways = {
        "ddp": DistributedDataParallel(planned(model_of(1), WHOLE), bucket_cap_mb=1),
        "fsdp whole": fully_shard(planned(model_of(1), WHOLE)),
        "fsdp parts": in_parts(LAYER),
    }
    found: dict[str, Any] = {"refusal": refusal()}
    for name, model in ways.items():
        found[name] = train(model, [rank])
        found[f"{name} extra"] = extras(model)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
