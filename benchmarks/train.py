"""A training step of one MoE block on one GPU, at fine-grained and at published sizes.

Run from the project's root:

    python -m benchmarks.train --json out/train.json --picture out/train.png
    python -m benchmarks.train --quick --only s7b-n256      without eager, compiled and errors
    python -m benchmarks.train --only s7b-n256 qwen3-30b --implementations moec sonicmoe
    python -m benchmarks.train --device cpu --only tiny     the script at work, anywhere

How it is measured. Blocks are transformers' own (a softmax router, SwiGLU experts) with random bf16
weights; each implementation runs at each size in a process of its own, with a time limit, one on
the GPU at a time (others import and compile meanwhile). Times are medians of calls in a row on four
rotating inputs, by CUDA events; `forward` keeps what the backward pass needs, `backward` is the
difference to both. TFLOP/s count the experts' products (6 T K H I
forward, twice that backward), while the times include the router. `held` is what lives between the
two without input and output, `peak` the most of the step without gradients. `bound` is the six
products alone as library products of equal groups: no routing, gathering, activation or
combination. Errors are relative, in norm, to float64, and inputs are drawn so that rounding cannot
change the routing. In sizes with `zipf` the busiest expert gets many times the mean. `GPU` times
are without the gaps in which the GPU waits for the host: an implementation whose host work takes
longer than its kernels is not slower for it in them. The last two columns say how many times as
fast moec is, and a table at the end has their geometric means, also of GPU times. `sonicmoe` is
left out where it is not installed; its results are compared with grouped_mm's before it is timed.
A row's time limit begins when the GPU is its own; compiling and tuning are within it.
"""

import argparse
import fcntl
import json
import math
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import sonic
from .report import describe, environment, markdown_table, version_of, write_json
from .train_step import MODELS, SIZES, compile_ahead, measure

LOCK = Path(tempfile.gettempdir()) / "moec_benchmark.lock"  # held by the process that measures
QUICK = ("moec", "grouped_mm", "bound")
PROCESSES = 3  # at a time: one measures, the others import and compile
RATIOS = ("forward", "backward")
COMPARED = {f"{p}_ratio": f"{p} x" for p in RATIOS}
COMPARED |= {f"{p}_gpu_ratio": f"GPU {p} x" for p in RATIOS}
HEADER = (
    *("implementation", "forward ms", "both ms", "forward TFLOP/s", "backward TFLOP/s"),
    *("both TFLOP/s", "held MiB", "peak MiB", "error output", "error gradients"),
    *("GPU forward ms", "GPU backward ms", "moec forward x", "moec backward x"),
)
FIGURES = {"forward_ms": ".3f", "both_ms": ".3f", "forward_tflops": ".0f", "backward_tflops": ".0f"}
FIGURES |= {"both_tflops": ".0f", "held_mib": ".0f", "peak_mib": ".0f"}
ON_GPU = {"forward_gpu_ms": ".3f", "backward_gpu_ms": ".3f"}


def run(arguments: argparse.Namespace, name: str, implementation: str) -> dict[str, Any]:
    """One row, measured in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.train", "--worker", name, implementation]
    command += ["--device", arguments.device, *(["--quick"] if arguments.quick else [])]
    row = {"size": name, "implementation": implementation}
    if implementation == "sonicmoe" and not sonic.is_installed():
        return row | {"failed": "left out: sonicmoe is not installed"}
    command += ["--limit", str(arguments.limit)]
    waiting = arguments.processes * (
        arguments.limit + 60
    )  # others may go first; the worker ends itself
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=waiting)
    except subprocess.TimeoutExpired:
        return row | {"failed": f"stopped after {waiting} s"}
    if done.returncode == -signal.SIGALRM:
        return row | {"failed": f"stopped after {arguments.limit} s"}
    for line in reversed(done.stdout.splitlines()):
        if line.startswith("{"):
            found: dict[str, Any] = json.loads(line)
            return found
    return row | {"failed": (done.stderr.strip().splitlines() or ["no output"])[-1][:160]}


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of one size, with how many times as fast moec is where it ran."""
    own = next((r for r in rows if r["implementation"] == "moec" and "failed" not in r), None)
    if own is None:
        return rows

    def of(row: dict[str, Any]) -> dict[str, float]:
        rates = {f"{p}_ratio": own[n] / row[n] for p in RATIOS if (n := f"{p}_tflops") in row}
        times = {f"{p}_gpu_ratio": row[n] / own[n] for p in RATIOS if (n := f"{p}_gpu_ms") in row}
        return rates | times

    return [row | of(row) for row in rows]


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of figures as text."""
    if "failed" in row:
        return (f"{row['implementation']}: {row['failed']}", *["-"] * (len(HEADER) - 1))
    figures, on_gpu = (
        [format(row[n], form) if n in row else "-" for n, form in forms.items()]
        for forms in (FIGURES, ON_GPU)
    )
    found = dict(row.get("errors", {}))
    output = found.pop("output", None)
    accuracy = ("-", "-") if output is None else (f"{output:.2e}", f"{max(found.values()):.2e}")
    faster = (f"{row[n]:.2f}" if n in row else "-" for n in (f"{p}_ratio" for p in RATIOS))
    return (row["implementation"], *figures, *accuracy, *on_gpu, *faster)


def geometric_mean(ratios: list[float]) -> str:
    """As a cell of a table."""
    return f"{math.exp(sum(map(math.log, ratios)) / len(ratios)):.3f}" if ratios else "-"


def means(rows: list[dict[str, Any]]) -> str:
    """A table: the geometric means, over the sizes, of how many times as fast moec is."""
    found = list[tuple[str, ...]]()
    for name in dict.fromkeys(r["implementation"] for r in rows if r["implementation"] != "moec"):
        mine = [r for r in rows if r["implementation"] == name and "forward_ratio" in r]
        if mine:
            means = (geometric_mean([r[n] for r in mine if n in r]) for n in COMPARED)
            found.append((name, str(len(mine)), *means))
    header = ("moec against", "sizes", *COMPARED.values())
    return markdown_table(header, found) if found else ""


def title(name: str) -> str:
    """The heading of one table."""
    s = SIZES[name]
    sizes = f"T {s.tokens}, H {s.hidden}, I {s.intermediate}, E {s.experts}, K {s.top_k}"
    return f"**{name}** ({sizes}{f', zipf {s.zipf}' if s.zipf else ''})"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """A picture of forward and backward rates by size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(row["size"] for row in rows))
    implementations = list(dict.fromkeys(row["implementation"] for row in rows))
    figure, axes = pyplot.subplots(2, 1, figsize=(1.2 * len(names) + 3, 7), sharex=True)
    width = 0.8 / len(implementations)
    for axis, part in zip(axes, ("forward", "backward"), strict=True):
        for i, implementation in enumerate(implementations):
            found = {r["size"]: r for r in rows if r["implementation"] == implementation}
            heights = [found.get(n, {}).get(f"{part}_tflops", 0.0) for n in names]
            places = [j + (i + 0.5) * width - 0.4 for j in range(len(names))]
            axis.bar(places, heights, width, label=implementation)
        axis.set_ylabel(f"{part} TFLOP/s")
    axes[0].legend(ncols=len(implementations), fontsize="small")
    axes[1].set_xticks(range(len(names)), names, rotation=30, ha="right")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    everything = [*MODELS, "bound"]
    parser.add_argument(
        "--only", nargs="+", choices=SIZES, default=[n for n in SIZES if n != "tiny"]
    )
    parser.add_argument("--implementations", "--against", nargs="+", choices=everything)
    parser.add_argument("--quick", action="store_true", help=f"{', '.join(QUICK)}; no errors")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--limit", type=int, default=240, help="seconds for each row")
    parser.add_argument(
        "--processes", type=int, default=PROCESSES, help="at a time: one measures, others import"
    )
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--picture", type=Path, help="also draw them (needs matplotlib)")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here; --device cpu --only tiny shows the script at work")
    arguments.worker = arguments.worker or ()
    chosen = arguments.implementations or (QUICK if arguments.quick else everything)
    arguments.implementations = chosen
    return arguments


def worker(arguments: argparse.Namespace) -> None:
    """Measure one row, alone on the GPU and within the time limit, and print it."""
    name, implementation = arguments.worker
    if arguments.device == "cuda":
        compile_ahead(name, implementation)
    with LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        signal.alarm(arguments.limit)  # ends the process, whatever it is stuck in
        row = measure(name, implementation, arguments.device, accurate=not arguments.quick)
    print(json.dumps(row), flush=True)


def main() -> None:
    """Measure and print."""
    arguments = parse_arguments()
    if arguments.worker:
        worker(arguments)
        return
    facts = environment(arguments.device)
    if "sonicmoe" in arguments.implementations and sonic.is_installed():
        facts |= {name: version_of(name) for name in sonic.PACKAGES}
    print(describe(facts), flush=True)
    rows: list[dict[str, Any]] = []
    wanted = [(n, i) for n in arguments.only for i in arguments.implementations]
    with ThreadPoolExecutor(arguments.processes) as pool:
        for row in pool.map(partial(run, arguments), *zip(*wanted, strict=True)):
            found = ratios([*(r for r in rows if r["size"] == row["size"]), row])
            rows = [r for r in rows if r["size"] != row["size"]] + found
            write_json(arguments.json, {"environment": facts, "rows": rows})
            if len(found) == len(arguments.implementations):
                table = markdown_table(HEADER, map(cells, found))
                print(f"\n{title(row['size'])}\n\n{table}", flush=True)
    print(f"\n{means(rows)}")
    if arguments.picture is not None:
        draw(rows, arguments.picture)


if __name__ == "__main__":
    main()
