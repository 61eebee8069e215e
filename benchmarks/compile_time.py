"""How long `import moec` takes, and what compiling 48 equal layers costs beside one.

    python -m benchmarks.compile_time --json out/compile_time.json

Imports are timed in fresh processes, in turns with `import torch`. The layers are OLMoE blocks
inside decoder layers with random weights; equal blocks are to be compiled once. Exit status 1:
a target was missed (0.3 s over torch; 1.2 times one layer).
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

import moec

from .report import describe, environment, markdown_table, write_json

LAYERS = 48
IMPORT_TARGET = 0.3
COMPILE_TARGET = 1.2


def import_seconds(module: str) -> float:
    """Wall-clock time of a fresh interpreter that imports `module` and ends."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
    return time.perf_counter() - start


def build(layers: int) -> OlmoeForCausalLM:
    """A narrow OLMoE model: what is timed does not depend on the width."""
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=8,
        num_experts_per_tok=2,
        pad_token_id=None,
    )
    return OlmoeForCausalLM(config)


def compile_seconds(layers: int) -> float:
    """`moec.compile` and the first training step, on a model that was not compiled before."""
    model = build(layers)
    tokens = torch.arange(16)[None]
    # The layers' own work is no cost of compiling: a second, compiled step tells what to take off.
    start = time.perf_counter()
    compiled = moec.compile(model)
    compiled(input_ids=tokens, labels=tokens).loss.backward()
    middle = time.perf_counter()
    compiled(input_ids=tokens, labels=tokens).loss.backward()
    return (middle - start) - (time.perf_counter() - middle)


def compile_in_fresh_process(layers: int) -> float:
    """The same in a process of its own, so that nothing in memory is reused."""
    code = f"from benchmarks.compile_time import compile_seconds; print(compile_seconds({layers}))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def measure(repeats: int) -> dict[str, float]:
    """Median seconds of each, the contestants in turns."""
    seconds: dict[str, list[float]] = {}
    for _ in range(repeats):
        for module in ("torch", "moec"):
            seconds.setdefault(f"import {module}", []).append(import_seconds(module))
        for layers in (1, LAYERS):
            name = f"compile {layers}"
            seconds.setdefault(name, []).append(compile_in_fresh_process(layers))
    return {name: statistics.median(values) for name, values in seconds.items()}


def targets(seconds: dict[str, float]) -> dict[str, bool]:
    """Which targets hold."""
    extra = seconds["import moec"] - seconds["import torch"]
    ratio = seconds[f"compile {LAYERS}"] / seconds["compile 1"]
    print(f"\nimport moec - import torch: {extra:+.2f} s (target: at most {IMPORT_TARGET} s)")
    print(f"{LAYERS} layers / 1 layer: {ratio:.2f} (target: at most {COMPILE_TARGET})")
    return {"import": extra <= IMPORT_TARGET, "compile": ratio <= COMPILE_TARGET}


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    facts: dict[str, Any] = environment("cpu")
    print(describe(facts), flush=True)
    seconds = measure(arguments.repeats)
    print(markdown_table(("", "seconds"), [(name, f"{s:.3f}") for name, s in seconds.items()]))
    held = targets(seconds)
    write_json(arguments.json, {"environment": facts, "seconds": seconds, "targets": held})
    return int(not all(held.values()))


if __name__ == "__main__":
    sys.exit(main())
