"""The demo's training step on the CPU: eager, grouped_mm and moec, interleaved.

    python -m benchmarks.cpu_step --steps 30 --json out/cpu_step.json

float32; forward, backward and AdamW on 4 x 256 tokens. The three take turns on every batch, in
rotating order; medians without the first steps. Exit status 1: moec is not the fastest.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from examples.small_olmoe import SHAPE, Trainee, batches, make_trainees, train_together

from .report import describe, environment, markdown_table, write_json

WARM_UP = 5


def summary(trainee: Trainee, batch: torch.Tensor) -> dict[str, Any]:
    """One model's figures."""
    seconds = trainee.seconds[WARM_UP:]
    low, middle, high = statistics.quantiles(seconds, n=4)
    return {
        "implementation": trainee.name,
        "median_ms": 1e3 * middle,
        "quartiles_ms": [1e3 * low, 1e3 * high],
        "peak_mib": trainee.peak_bytes(batch) / 2**20,
        "last_loss": trainee.losses[-1],
    }


def cells(row: dict[str, Any], baseline: float) -> tuple[str, ...]:
    """A row of figures as text."""
    low, high = row["quartiles_ms"]
    ratio = f"{baseline / row['median_ms']:.2f}"
    figures = (f"{row['median_ms']:.0f}", f"{low:.0f} to {high:.0f}", ratio)
    return (row["implementation"], *figures, f"{row['peak_mib']:.0f}")


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30, help="of each model, at least 10")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    facts = environment("cpu")
    print(describe(facts), flush=True)
    trainees = make_trainees()
    for _ in train_together(trainees, batches(max(10, arguments.steps))):
        pass
    batch = next(batches(1, seed=1))
    rows = [summary(trainee, batch) for trainee in trainees]
    baseline = min(row["median_ms"] for row in rows[:-1])
    header = ("implementation", "median ms", "middle half", "best baseline / this", "peak MiB")
    print(markdown_table(header, [cells(row, baseline) for row in rows]))
    write_json(arguments.json, {"environment": facts, "shape": SHAPE, "rows": rows})
    return int(rows[-1]["median_ms"] >= baseline)


if __name__ == "__main__":
    sys.exit(main())
