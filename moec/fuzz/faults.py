"""Is the net tight? Faults are planted one by one: each must be found, and bisection must name it.

    python -m moec.fuzz.faults                  all of them, two at a time
    python -m moec.fuzz.faults --only sigmoid-slope --verbose

Each fault has a process of its own, which loads one module of the compiler with one line changed,
asks the net of random graphs until something is wrong, runs ``moec bisect`` on what was found, and
reduces it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass

from moec.fuzz.fault_list import FAULTS
from moec.fuzz.planting import ROOT, Fault, plant

# A fault that so many graphs do not show is one that the net lets through.
GRAPHS = 300
SECONDS = 600.0


@dataclass(frozen=True)
class Outcome:
    """What became of a fault: the seed that showed it, bisection's words and seconds, and the share
    of the ops that is left after reduction.
    """

    name: str
    seed: int | None = None
    problem: str = ""
    bisection: str = ""
    is_named: bool = False
    seconds: float = 0.0
    kept: float = 1.0

    @property
    def is_found(self) -> bool:
        """Whether the net caught it."""
        return self.seed is not None

    def __str__(self) -> str:
        if not self.is_found:
            return f"{self.name}: NOT FOUND {self.problem}"
        named = "named" if self.is_named else "NOT NAMED"
        return (
            f"{self.name}: graph {self.seed}, {named} in {self.seconds:.1f} s,"
            f" {self.kept:.0%} of the ops left"
        )


def outcome_of(fault: Fault) -> Outcome:
    """Plant a fault in this process and search for it; nothing of moec may be loaded yet."""
    plant(fault)
    from moec.fuzz.hunting import hunt

    return hunt(fault)


def in_process(fault: Fault) -> Outcome:
    """The same in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if fault.target == "triton":
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "moec.fuzz.faults", "--plant", fault.name]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=SECONDS, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        return Outcome(fault.name, problem=f"nothing after {SECONDS:.0f} s")
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        return Outcome(fault.name, problem=done.stderr.strip()[-400:])
    return Outcome(**json.loads(lines[-1]))


def main(arguments: Sequence[str]) -> int:
    """Run from the command line; returns the exit code."""
    options = _options(arguments)
    if options.plant:
        fault = next(f for f in FAULTS if f.name == options.plant)
        print(json.dumps(asdict(outcome_of(fault))))
        return 0
    chosen = [f for f in FAULTS if not options.only or f.name in options.only]
    start = time.monotonic()
    with ThreadPoolExecutor(options.jobs) as pool:
        outcomes = []
        for future in as_completed([pool.submit(in_process, fault) for fault in chosen]):
            outcome = future.result()
            outcomes.append(outcome)
            print(outcome, flush=True)
            if options.verbose or not outcome.is_named:
                print(f"{outcome.problem}\n{outcome.bisection}", flush=True)
    return _summary(outcomes, time.monotonic() - start)


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m moec.fuzz faults", description=__doc__)
    parser.add_argument("--only", nargs="*", help="names of faults")
    parser.add_argument("--jobs", type=int, default=2, help="processes (2)")
    parser.add_argument("--verbose", action="store_true", help="print what bisection prints")
    parser.add_argument("--plant", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _summary(outcomes: Sequence[Outcome], seconds: float) -> int:
    found = [o for o in outcomes if o.is_found]
    named = [o for o in found if o.is_named]
    kept = statistics.median(o.kept for o in found) if found else 1.0
    slowest = max((o.seconds for o in found), default=0.0)
    print(
        f"{len(outcomes)} faults: {len(found)} found, {len(named)} named"
        f" (at most {slowest:.0f} s each); reduction leaves {kept:.0%} of the ops (median);"
        f" {seconds:.0f} s"
    )
    return 0 if len(found) == len(outcomes) and len(named) >= 0.95 * len(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
