"""Every MoE family of the installed transformers on one GPU: the emitted kernels against float64.

Run from the project's root:

    python -m benchmarks.all_families                     all families, bf16
    python -m benchmarks.all_families --only mixtral,dbrx

The tiny model of each family (moec.families) runs eager and compiled in bf16, and eager in float64
on the same bf16 values, forward and backward. Errors are relative, in norm, of the first result and
of all gradients together: medians over fifteen inputs (five seeds at lengths 1, 7 and 33), since a
token whose experts nearly tie goes to another one by the least rounding, in eager as in compiled
bf16. Each family has a process of its own, a few run side by side: nothing is timed. Exit status 1:
fewer than twelve families ran on Triton kernels, or an error is above 1.5 times eager bf16's.
"""

import argparse
import concurrent.futures
import copy
import json
import os
import re
import statistics
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import moec
from moec.capture.described import describe as describe_graph
from moec.families.discover import families
from moec.families.inputs import first_tensor, inputs_for
from moec.families.row import tiny_model

from .report import describe, environment, markdown_table, write_json

LENGTHS = (1, 7, 33)
SEEDS = range(5)
LIMIT = 1.5
WANTED = 12
# Below this an error of bf16 is luck: half a unit of its last place.
FLOOR = 2**-9
TIMEOUT = 200
MARK = "RESULT "
# A grouped product that a module computes by a library call; in its docstring lines begin with %.
_OUTSIDE = re.compile(r"^ +\w+ = moe\.grouped_", re.MULTILINE)


def results(model: nn.Module, inputs: dict[str, Any], seed: int) -> tuple[Tensor, Tensor]:
    """The first result, and all gradients of a loss that weighs its elements differently."""
    device = next(model.parameters()).device
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    given = {
        k: v.to(device, dtype if v.is_floating_point() else v.dtype) for k, v in inputs.items()
    }
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    output = first_tensor(model(**given))
    weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64, device=device)
    loss = (output.double() * weights.reshape(output.shape)).sum()
    torch.autograd.backward(loss)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    flat = torch.cat([g.double().flatten() for g in gradients])
    return output.detach().double().cpu(), flat.cpu()


def error(found: Tensor, expected: Tensor) -> float:
    """The relative error in norm, where the expected values are finite."""
    finite = expected.isfinite()
    gap = (found[finite] - expected[finite]).norm()
    return float(gap / expected[finite].norm().clamp(min=1e-30))


def measure(name: str, device: str) -> dict[str, Any]:
    """The row of one family."""
    warnings.simplefilter("ignore")
    family = next(f for f in families() if f.name == name)
    model = tiny_model(family).to(device, torch.bfloat16).eval()
    exact = copy.deepcopy(model).double()
    compiled = moec.compile(model)
    errors: list[tuple[float, float, float, float]] = []
    for length in LENGTHS:
        for seed in SEEDS:
            inputs = inputs_for(model, sequence=length, seed=seed)
            wanted, own, ours = (results(m, inputs, seed) for m in (exact, model, compiled))
            pairs = [(error(ours[i], wanted[i]), error(own[i], wanted[i])) for i in (0, 1)]
            errors.append((*pairs[0], *pairs[1]))
    columns = [statistics.median(column) for column in zip(*errors, strict=True)]
    return {"family": name, "errors": columns, **forms_of(compiled), **kernels_of(compiled)}


def all_regions(compiled: nn.Module) -> list[Any]:
    """The regions of a compiled model, those of experts inside blocks among them."""
    found = moec.regions(compiled)
    return [r for region in found for r in (region, region.inner) if r is not None]


def forms_of(compiled: nn.Module) -> dict[str, str]:
    """The routers and experts of a compiled model, in words."""
    found = all_regions(compiled)
    graphs = [r.first.graph for r in found if r.first is not None and r.first.graph is not None]
    words = [describe_graph(graph) for graph in dict.fromkeys(graphs)]
    routers = dict.fromkeys(w.router for w in words if w.router != "none")
    return {
        "router": "; ".join(routers),
        "experts": "; ".join(dict.fromkeys(w.experts for w in words)),
    }


def kernels_of(compiled: nn.Module) -> dict[str, Any]:
    """What served a compiled model: status, targets, kernels, and products outside of kernels."""
    artifacts = {a.path: a for r in all_regions(compiled) for a in r.artifacts}
    texts = [path.read_text(encoding="utf-8") for path in artifacts]
    return {
        "status": sorted({r.status for r in moec.regions(compiled)}),
        "targets": sorted({a.target for a in artifacts.values()}),
        "kernels": sum(text.count("@triton.jit") for text in texts),
        "outside": sum(len(_OUTSIDE.findall(text)) for text in texts),
    }


def in_a_process(name: str, device: str) -> dict[str, Any]:
    """The row of one family, measured in a process of its own."""
    words = [sys.executable, "-m", "benchmarks.all_families", "--worker", name, "--device", device]
    environment_ = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    try:
        ran = subprocess.run(
            words, capture_output=True, text=True, timeout=TIMEOUT, env=environment_, check=False
        )
    except subprocess.TimeoutExpired:
        return {"family": name, "failed": f"no result in {TIMEOUT} s"}
    lines = [line for line in ran.stdout.splitlines() if line.startswith(MARK)]
    if lines:
        return dict(json.loads(lines[-1].removeprefix(MARK)))
    return {"family": name, "failed": (ran.stderr.strip().splitlines() or ["no output"])[-1][:150]}


def ratio(row: dict[str, Any]) -> float:
    """The larger of our errors over eager's."""
    ours, own, our_gradients, own_gradients = row["errors"]
    return float(max(ours / max(own, FLOOR), our_gradients / max(own_gradients, FLOOR)))


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of figures as text."""
    if "failed" in row:
        return (row["family"], "", "", "", "", "", f"not run: {row['failed']}")
    a, b, c, d = row["errors"]
    served = f"{', '.join(row['status'])}; {', '.join(row['targets'])}, {row['kernels']} kernels"
    served += f", {row['outside']} products outside" if row["outside"] else ""
    texts = (f"{a:.1e} / {b:.1e}", f"{c:.1e} / {d:.1e}", f"{ratio(row):.2f}")
    return (row["family"], row["router"], row["experts"], *texts, served)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="families, separated by commas")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--jobs", type=int, default=12, help="families side by side")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(MARK + json.dumps(measure(arguments.worker, arguments.device)))
        return 0
    facts = environment(arguments.device)
    print(describe(facts), flush=True)
    chosen = set(filter(None, arguments.only.split(",")))
    names = [f.name for f in families() if not chosen or f.name in chosen]
    rows: list[dict[str, Any]] = []
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        waiting = [pool.submit(in_a_process, name, arguments.device) for name in names]
        for done in concurrent.futures.as_completed(waiting):
            rows.append(done.result())
            print(" | ".join(cells(rows[-1])), flush=True)
    rows.sort(key=lambda row: str(row["family"]))
    header = ("family", "router", "experts", "result", "gradients", "ratio", "served by")
    print("\n" + markdown_table(header, map(cells, rows)), flush=True)
    write_json(arguments.json, {"environment": facts, "rows": rows})
    served = [row for row in rows if row.get("targets") == ["triton"]]
    worst = max((ratio(row) for row in served), default=0.0)
    print(f"{len(served)} families on Triton kernels; worst ratio {worst:.2f}")
    return int(len(served) < WANTED or worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
