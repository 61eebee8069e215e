"""Five model families on one GPU: accuracy of the emitted kernels against float64.

Run from the project's root:

    python -m benchmarks.families                 all families, bf16, and generate() in float32
    python -m benchmarks.families --only olmoe

Each tiny model of tests/models.py runs eager and compiled in bf16, and eager in float64 on the same
bf16 values. Errors are relative, in norm: of the logits, of the loss, and of all gradients
together; medians over nine inputs, since a token whose experts nearly tie goes to another one by
the least rounding, in eager as in compiled bf16. The lengths are 1, 2, 7, 33 and 257; one
compilation serves them all. Exit status 1: an error above 1.5 times that of eager bf16, another
token, or a target that is not triton.
"""

import argparse
import copy
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import moec
from tests.models import FAMILIES, VOCABULARY, build, tokens

from .report import describe, environment, markdown_table, write_json

LENGTHS = (1, 2, 7, 33, 257)
LIMIT = 1.5
SEEDS = range(9)


def run(model: nn.Module, length: int, seed: int) -> dict[str, Tensor]:
    """Logits, loss and the gradients of one step, in float64 on the CPU."""
    device = next(model.parameters()).device
    arguments = {k: v.to(device) for k, v in tokens(2, length, labels=length > 1).items()}
    for name in ("input_ids", "labels"):
        if name in arguments:
            arguments[name] = (arguments[name] - 3 + 7 * seed) % (VOCABULARY - 3) + 3
    model.zero_grad()
    output = model(**arguments)
    loss = output.loss if length > 1 else output.logits.float().square().mean()
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.double().flatten() for g in gradients])
    results = {"logits": output.logits.detach(), "loss": loss.detach(), "gradients": flat}
    return {name: value.double().cpu() for name, value in results.items()}


def error(found: Tensor, expected: Tensor) -> float:
    """The relative error in norm."""
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


def accuracy(family: str, device: str) -> list[dict[str, Any]]:
    """A row for each length: errors of eager and compiled."""
    model = build(family, hidden_size=64).to(device, torch.bfloat16)
    exact = copy.deepcopy(model).double()
    compiled = moec.compile(model)
    rows: list[dict[str, Any]] = []
    for length in LENGTHS:
        errors: dict[str, list[tuple[float, float]]] = {}
        for seed in SEEDS:
            expected, eager, ours = (run(m, length, seed) for m in (exact, model, compiled))
            for name, value in expected.items():
                pair = error(ours[name], value), error(eager[name], value)
                errors.setdefault(name, []).append(pair)
        medians = {
            n: tuple(map(statistics.median, zip(*e, strict=True))) for n, e in errors.items()
        }
        rows.append({"family": family, "length": length, **medians})
    artifacts = {id(a): a for region in moec.regions(compiled) for a in region.artifacts}
    for row in rows:
        row["artifacts"], row["target"] = len(artifacts), next(iter(artifacts.values())).target
    return rows


def same_tokens(family: str, device: str) -> bool:
    """Whether greedy generation in float32 gives the same tokens compiled as eager."""
    model = build(family, hidden_size=64).to(device)
    compiled = moec.compile(model)
    prompt = tokens(2, 6, labels=False)["input_ids"].to(device)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    generators: list[Any] = [model, compiled]
    with torch.no_grad():
        expected, found = (m.generate(prompt, **options) for m in generators)
    return bool(torch.equal(expected, found))


def ratio(row: dict[str, Any], name: str) -> float:
    """Our error over eager's. The error of one rounded number, the loss, can be zero by chance: it
    counts from half a unit of bf16's last place on.
    """
    ours, eager = row[name]
    return float(ours / max(eager, 2**-8 if name == "loss" else 1e-3))


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of figures as text."""
    pairs = [row[name] for name in ("logits", "loss", "gradients")]
    texts = [f"{ours:.1e} / {eager:.1e}" for ours, eager in pairs]
    worst = max(ratio(row, name) for name in ("logits", "loss", "gradients"))
    return (row["family"], str(row["length"]), *texts, f"{worst:.2f}", row["target"])


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=list(FAMILIES), action="append")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    facts = environment(arguments.device)
    print(describe(facts), flush=True)
    families = arguments.only or list(FAMILIES)
    rows = [row for family in families for row in accuracy(family, arguments.device)]
    header = ("family", "length", "logits", "loss", "gradients", "worst ratio", "target")
    print(markdown_table(header, map(cells, rows)), flush=True)
    equal = {family: same_tokens(family, arguments.device) for family in families}
    print("generate() token-identical in float32:", equal)
    write_json(arguments.json, {"environment": facts, "rows": rows, "generate": equal})
    worst = max(ratio(row, n) for row in rows for n in ("logits", "loss", "gradients"))
    targets = {row["target"] for row in rows} == {"triton"} or arguments.device == "cpu"
    return int(worst > LIMIT or not all(equal.values()) or not targets)


if __name__ == "__main__":
    sys.exit(main())
