"""One process of tests/test_distributed.py: ``python tests/distributed.py RANK FOLDER``.

Trains tiny models under FSDP2 and DDP with and without moec and prints ``name: losses`` lines; the
processes meet through a file, so that no port is needed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import moec
from moec.errors import CompileError
from tests.models import build, tokens

STEPS = 3
WORLD = 2
FAMILIES = {"olmoe": "olmoe", "mixtral": "mixtral", "shared": "deepseek_v3"}


def tiny(family: str) -> Any:
    """In float64: what is left of rounding is in the norms, which models take in float32."""
    return build(family).double()


def batch(rank: int, step: int) -> dict[str, torch.Tensor]:
    """The rows of one process; its peer has the others."""
    arguments = tokens(2 * WORLD, 5 + 2 * step)
    return {k: v[2 * rank : 2 * rank + 2] for k, v in arguments.items()}


def loss_of(model: nn.Module, rows: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss of the next tokens in float64; a language model's own is in float32."""
    logits = model(**{k: v for k, v in rows.items() if k != "labels"}).logits
    labels = rows["labels"][:, 1:].flatten()
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels)


def train(model: nn.Module, rank: int) -> list[float]:
    """The mean losses of a few clipped steps, over all processes."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(STEPS):
        loss = loss_of(model, batch(rank, step))
        loss.backward()  # type: ignore[no-untyped-call]
        norm: Any = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses += [mean.item() / WORLD, float(norm)]
    return losses


def shard(model: Any) -> Any:
    """Each layer by itself, then the rest."""
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def compiled(model: nn.Module) -> Any:
    """Compiled in strict mode: nothing may be left as it was."""
    return moec.compile(model, strict=True)


def statuses(model: nn.Module) -> set[str]:
    """What became of the regions."""
    return {region.status for region in moec.regions(model)}


def save_and_load(model: Any, family: str) -> float:
    """The largest difference after a state dict went out, whole, and came back into a fresh
    sharded model.
    """
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    sharded = {k: v.clone() for k, v in model.state_dict().items()}
    fresh = shard(compiled(tiny(family)))
    fresh.load_state_dict(sharded)
    arguments = batch(0, 0)
    ours = model(**arguments).logits
    differences = [fresh(**arguments).logits - ours]
    if dist.get_rank() == 0:  # the whole state dict is on the first process
        plain = tiny(family)
        plain.load_state_dict(whole)
        differences.append(plain(**arguments).logits - ours)
    return max(float(d.abs().max().item()) for d in differences)


def counted(wrapped: nn.Module) -> dict[str, int]:
    """How often each parameter's gradient arrives in one step."""
    counts: dict[str, int] = {}

    def note(name: str) -> Callable[[torch.Tensor], None]:
        def hook(_: torch.Tensor) -> None:
            counts[name] = counts.get(name, 0) + 1

        return hook

    handles = []
    for name, parameter in wrapped.named_parameters():
        hook = note(name)
        handles.append(parameter.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]
    wrapped(**batch(dist.get_rank(), 0)).loss.backward()
    wrapped.zero_grad()
    for handle in handles:
        handle.remove()
    return counts


def fsdp(rank: int) -> dict[str, Any]:
    """Losses under FSDP2, by family and by which came first."""
    found: dict[str, Any] = {"plain": train(shard(tiny("olmoe")), rank)}
    for name, family in FAMILIES.items():
        before = shard(compiled(tiny(family)))
        found[f"{name} compiled before"] = train(before, rank)
        after = compiled(shard(tiny(family)))
        found[f"{name} compiled after"] = train(after, rank)
        found[f"{name} statuses"] = sorted(statuses(before) | statuses(after))
    found["state dict"] = save_and_load(before, family)
    found["alone"] = refusal(after)
    return found


def refusal(model: Any) -> str:
    """What a call of one block says while its weights are sharded."""
    model.reshard()
    model.model.layers[1].reshard()
    try:
        model.model.layers[1].mlp(torch.randn(1, 3, 32, dtype=torch.float64))
    except CompileError as error:
        return str(error)
    return "not refused"


def ddp(rank: int) -> dict[str, Any]:
    """Losses under DDP, by whether unused parameters are looked for."""
    found: dict[str, Any] = {"ddp plain": train(DistributedDataParallel(tiny("olmoe")), rank)}
    for unused in (False, True):
        wrapped = DistributedDataParallel(compiled(tiny("olmoe")), find_unused_parameters=unused)
        found[f"ddp compiled {unused}"] = train(wrapped, rank)
        found[f"ddp counts {unused}"] = sorted(set(counted(wrapped).values()))
    return found


def main() -> None:
    """Run everything and write what was found to FOLDER/RANK.json."""
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=WORLD)
    found = {**fsdp(rank), **ddp(rank)}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
