"""The emitted kernels of a training step under NVIDIA's compute-sanitizer.

    python -m benchmarks.sanitizer                     every template and tool
    python -m benchmarks.sanitizer --templates gluon --tools racecheck --limit 300

A small block runs forward and backward at several numbers of tokens and routings. PyTorch takes
each tensor's memory from the driver, so that an access past a tensor's end is one past an
allocation. It needs an NVIDIA GPU and compute-sanitizer
on the path.
"""

import argparse
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import torch

from .emitted_check import TEMPLATES, Shape, artifact, inputs, run_both
from .report import describe, environment, markdown_table, write_json

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
SMALL = Shape(512, 256, 8, 2)
CASES = ((1, "random"), (257, "random"), (257, "one"), (600, "skewed"))


def worker(template: str) -> None:
    """The steps that are looked at."""
    descriptors, gluon = TEMPLATES[template]
    compiled = artifact(SMALL, descriptors, True, gluon=gluon)
    for tokens, routing in CASES:
        torch.manual_seed(0)
        data = inputs(SMALL, tokens, routing)
        results = run_both(compiled, data, torch.randn_like(data[0]))
        torch.cuda.synchronize()
        if not all(bool(t.isfinite().all()) for t in results):
            raise SystemExit(f"results that are not finite at T = {tokens}, {routing}")
    print(f"{len(CASES)} steps done", flush=True)


def look(template: str, tool: str, limit: int) -> dict[str, Any]:
    """One tool's verdict on one template."""
    row: dict[str, Any] = {"template": template, "tool": tool}
    command = ["compute-sanitizer", "--tool", tool, "--print-limit", "5"]
    command += [sys.executable, "-m", "benchmarks.sanitizer", "--worker", template]
    environ = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environ)
    except subprocess.TimeoutExpired:
        return row | {"verdict": f"stopped after {limit} s"}
    lines = (done.stdout + done.stderr).splitlines()
    said = [line.removeprefix("=========").strip() for line in lines if line[:9] == "=" * 9]
    summary = next((s for s in reversed(said) if "SUMMARY" in s), "no summary")
    finished = any("steps done" in line for line in lines)
    return row | {"verdict": summary if finished else f"not finished: {summary}", "said": said[:60]}


def main() -> None:
    """Look and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--templates", nargs="+", choices=TEMPLATES, default=list(TEMPLATES))
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--limit", type=int, default=300, help="seconds for each")
    parser.add_argument("--together", type=int, default=6, help="processes at a time")
    parser.add_argument("--json", type=Path, help="also write what the tools say to this file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker)
        return
    if not torch.cuda.is_available() or shutil.which("compute-sanitizer") is None:
        parser.error("it needs an NVIDIA GPU, and compute-sanitizer on the path")
    facts = environment("cuda")
    print(describe(facts), flush=True)
    cases = list(product(arguments.templates, arguments.tools))
    with ThreadPoolExecutor(arguments.together) as pool:
        rows = list(pool.map(lambda case: look(case[0], case[1], arguments.limit), cases))
    table = [(row["template"], row["tool"], row["verdict"]) for row in rows]
    print(markdown_table(("template", "tool", "verdict"), table))
    write_json(arguments.json, {"environment": facts, "rows": rows})


if __name__ == "__main__":
    main()
