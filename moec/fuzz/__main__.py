"""Fuzzing from the command line: random graphs and modules through the whole compiler.

    python -m moec.fuzz graphs --count 1000     whole pipelines, emitted code, gradients
    python -m moec.fuzz passes --count 2000     every pass alone, at several stages
    python -m moec.fuzz modules --count 300     random nn.Modules through moec.compile
    python -m moec.fuzz all --minutes 10        in turns, for a chosen time
    python -m moec.fuzz faults                  planted faults: is the net tight?
    python -m moec.fuzz files --count 100000    mutated files into every parser

Every seed gives the same case in every process. A failure is reduced and written into --save as a
file that tests/test_regressions.py asks again. With TRITON_INTERPRET=1 emitted kernels run, too.
Exit code 0: nothing is wrong; 1: something is; 2: wrong usage.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from functools import partial
from pathlib import Path

from moec.fuzz.cases import Found, answer, prepare

KINDS = ("graphs", "passes", "modules")
# commands with arguments of their own
_OTHERS = {"faults": "faults", "files": "files", "cache": "cache_stress", "hashes": "determinism"}


def main(arguments: Sequence[str]) -> int:
    """Run a command; returns the exit code."""
    if arguments and arguments[0] in _OTHERS:
        module = importlib.import_module(f"moec.fuzz.{_OTHERS[arguments[0]]}")
        return int(module.main(arguments[1:]))
    options = _options(arguments)
    kinds = KINDS if options.kind == "all" else (options.kind,)
    start, wrong, done = time.monotonic(), 0, 0
    for kind, seed, problems in _results(kinds, options):
        done += 1
        wrong += bool(problems)
        for problem in problems:
            print(f"{kind} seed {seed}: {problem}", flush=True)
        _report(done, wrong, time.monotonic() - start)
    print(f"\n{done} cases in {time.monotonic() - start:.0f} s, {wrong} with failures")
    return 1 if wrong else 0


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m moec.fuzz",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kind", choices=(*KINDS, "all", *_OTHERS))
    parser.add_argument("--count", type=int, default=100, help="cases of each kind (100)")
    parser.add_argument("--seed", type=int, default=0, help="the first seed (0)")
    parser.add_argument("--minutes", type=float, default=0, help="go on for so long instead")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument(
        "--save", type=Path, default=Path("tests/regressions"), help="folder for failures"
    )
    return parser.parse_args(arguments)


def _results(kinds: Sequence[str], options: argparse.Namespace) -> Iterator[Found]:
    """What comes out of every case, as cases end."""
    work = partial(answer, folder=options.save)
    context = multiprocessing.get_context("spawn")
    waiting: set[Future[Found]] = set()
    with ProcessPoolExecutor(options.jobs, context, prepare) as pool:
        for case in _cases(kinds, options):
            waiting.add(pool.submit(work, case))
            if len(waiting) >= 2 * options.jobs:
                ended, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in ended)
        yield from (future.result() for future in waiting)


def _cases(kinds: Sequence[str], options: argparse.Namespace) -> Iterator[tuple[str, int]]:
    end = time.monotonic() + 60 * options.minutes
    seed = options.seed
    while time.monotonic() < end if options.minutes else seed < options.seed + options.count:
        yield from ((kind, seed) for kind in kinds)
        seed += 1


def _report(done: int, wrong: int, seconds: float) -> None:
    if sys.stderr.isatty():
        print(f"\r{done} cases, {wrong} with failures, {seconds:.0f} s", end="", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
