"""Every kernel once with element offsets beyond 2^31, against the same work in parts below.

    python -m benchmarks.wide_index                    all cases, on a GPU with 80 GB
    python -m benchmarks.wide_index --only rows-tma --json wide.json
    TRITON_INTERPRET=1 python -m benchmarks.wide_index --small     the same steps on a CPU, small

Cases run in processes of their own, as many at a time as fit into the memory; each compiles its
kernels while others run, and ends after a limit of seconds. ``elements`` is the largest tensor of a
case. Errors are relative, in norm; ``differ`` counts elements that differ in any bit.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .report import describe, environment, markdown_table, write_json
from .wide_cases import CASES, Case, Result, Setting, results

MEMORY = 70.0  # GiB in use at a time, at most
COMPILING = 1.5  # GiB of a process that has nothing but its kernels
HEADER = ("case", "result", "products", "elements", "error", "limit", "differ", "")


@dataclass
class Running:
    """A case's process."""

    case: Case
    process: Any
    folder: Path
    started: float
    went: bool = False

    @property
    def ready(self) -> bool:
        """Whether it waits for its memory."""
        return self.folder.joinpath("ready").exists()

    @property
    def gib(self) -> float:
        """What it takes now."""
        return self.case.gib if self.went else COMPILING

    def go(self) -> None:
        """Let it take its memory."""
        self.went = True
        self.folder.joinpath("go").touch()


def worker(case: Case, folder: Path, small: bool) -> None:
    """One case in this process: waits for the file ``go``, writes a JSON line a result."""
    setting = Setting(case.template, "cpu" if small else "cuda", small)
    if not small:
        total = torch.cuda.get_device_properties(0).total_memory / 2**30
        torch.cuda.set_per_process_memory_fraction(min(1.0, case.gib / total))

    def ready() -> None:
        if not small:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        folder.joinpath("ready").touch()
        while not folder.joinpath("go").exists():
            time.sleep(0.02)

    if not case.waits:
        ready()
    with folder.joinpath("results").open("w") as out:
        for result in results(case, setting, ready if case.waits else lambda: None):
            peak = 0.0 if small else torch.cuda.max_memory_allocated() / 2**30
            line = {**asdict(result), "right": result.right, "peak_gib": round(peak, 2)}
            out.write(json.dumps(line) + "\n")
            out.flush()


def start(case: Case, folder: Path, small: bool) -> Running:
    """Begin a case."""
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "benchmarks.wide_index", "--worker", case.name, str(folder)]
    command += ["--small"] if small else []
    log = folder.joinpath("log").open("w")
    environ = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environ)
    return Running(case, process, folder, time.monotonic())


def run_all(cases: list[Case], folder: Path, small: bool, limit: float) -> list[Running]:
    """All cases, those that wait first to compile, then one after the other as memory allows."""
    running = [start(case, folder / case.name, small) for case in cases]
    left = list(running)
    while left:
        for one in left:
            used = sum(other.gib for other in left if other is not one)
            if one.ready and not one.went and used + one.case.gib <= MEMORY:
                one.go()
                one.started = time.monotonic()
            if time.monotonic() - one.started > limit and (one.went or not one.ready):
                one.process.kill()
        left = [one for one in left if one.process.poll() is None]
        time.sleep(0.02)
    return running


def outcome(one: Running) -> list[dict[str, Any]]:
    """A case's results, and a last one if its process did not end well."""
    file = one.folder / "results"
    lines = file.read_text().splitlines() if file.exists() else []
    found = [json.loads(line) for line in lines]
    if one.process.returncode or not found:
        tail = one.folder.joinpath("log").read_text().strip().splitlines()[-1:]
        code = one.process.returncode
        what = f"ended with {code}: {tail[0] if tail else 'no output'}"
        nothing = Result(one.case.name, what[:200], 0, float("inf"), 0.0)
        found.append({**asdict(nothing), "right": False, "peak_gib": 0.0})
    return found


def rows_of(found: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The table."""
    return [
        (
            r["case"],
            r["what"],
            r["kernels"],
            f"{r['elements'] / 2**31:.2f} x 2^31",
            f"{r['error']:.1e}",
            f"{r['limit']:.0e}",
            str(r["differ"]),
            "right" if r["right"] else "WRONG",
        )
        for r in found
    ]


def main() -> None:
    """Run the cases and print what they found; exit code 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--small", action="store_true", help="small sizes, on the CPU")
    parser.add_argument("--limit", type=float, default=90, help="seconds for each case")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        name, folder = options.worker
        worker(CASES[name], Path(folder), options.small)
        return
    cases = [CASES[name] for name in options.only]
    if options.small:
        cases = [case for case in cases if case.template != "gluon"]  # which is not interpreted
    device = environment("cpu" if options.small else "cuda")
    print(describe(device), flush=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        ran = run_all(cases, Path(folder), options.small, options.limit)
        outcomes = {one.case.name: outcome(one) for one in ran}
    seconds = round(time.monotonic() - began, 1)
    found = [line for lines in outcomes.values() for line in lines]
    print(markdown_table(HEADER, rows_of(found)))
    peaks = {name: max(r["peak_gib"] for r in lines) for name, lines in outcomes.items()}
    print(f"{seconds} s; peak GiB: {peaks}")
    report = {"environment": device, "seconds": seconds, "peak_gib": peaks, "results": found}
    write_json(options.json, report)
    sys.exit(not all(r["right"] for r in found))


if __name__ == "__main__":
    main()
