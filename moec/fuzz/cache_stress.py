"""The cache under stress: many processes at once, writers killed at any moment, damaged files.

``python -m moec.fuzz.cache_stress`` runs all three at full size and prints what it counted.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from moec import cache

_KEYS = 4
# A file that takes some milliseconds to write, so that kills hit the middle of it.
_LARGE_LINES = 20_000


def _source(key: int, lines: int = 300) -> str:
    return f"VALUE = {key}\n" + f"# module number {key}\n" * lines


# many processes
def _work(folder: str, seed: int, rounds: int) -> None:
    """Store and load the same few modules as the others do; remove some, as a user may."""
    chance = random.Random(seed)
    for _ in range(rounds):
        key = chance.randrange(_KEYS)
        path = cache.store(_source(key), "shared", folder)
        sys.modules.pop(f"moec_emitted.{path.stem}", None)
        if cache.load(path, _source(key)).VALUE != key:
            raise RuntimeError(f"{path} gave another module")
        if chance.random() < 0.1:
            path.unlink(missing_ok=True)


def _strict_work(folder: str, seed: int, rounds: int) -> None:
    warnings.simplefilter("error")  # no file is ever damaged here: a warning is a failure
    _work(folder, seed, rounds)


def concurrent(processes: int, rounds: int, seed: int = 0) -> list[str]:
    """What went wrong when so many processes used the same keys at once."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        jobs = [(folder, seed + i, rounds) for i in range(processes)]
        workers = [context.Process(target=_strict_work, args=job) for job in jobs]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        codes = [worker.exitcode for worker in workers]
        problems = [f"process {i} ended with {code}" for i, code in enumerate(codes) if code]
        problems += _torn(Path(folder), range(_KEYS), 300, "shared")
        left = [p.name for p in Path(folder).glob(".*")]
    print(
        f"{processes} processes, {rounds} rounds each: {len(problems)} problems, {len(left)} left"
    )
    return problems + [f"{name} was left behind" for name in left]


def _torn(folder: Path, keys: Sequence[int], lines: int, name: str) -> list[str]:
    """Entries that hold anything but the text that they are named after."""
    whole = {_source(key, lines).encode() for key in keys}
    found = [path for path in folder.glob(f"{name}_*.py") if path.read_bytes() not in whole]
    return [f"{path.name} is torn" for path in found]


# killed writers
def _write_forever(folder: str, keys: Sequence[int]) -> None:
    while True:
        for key in keys:
            path = cache.store(_source(key, _LARGE_LINES), "killed", folder)
            path.unlink(missing_ok=True)


def killed(kills: int, seed: int = 0) -> list[str]:
    """What was torn after writers were killed at random moments."""
    context, chance = multiprocessing.get_context("fork"), random.Random(seed)
    problems, inside = [], 0
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(kills):
            worker = context.Process(target=_write_forever, args=(folder, range(_KEYS)))
            worker.start()
            time.sleep(chance.uniform(0.0, 0.03))
            os.kill(int(worker.pid or 0), signal.SIGKILL)
            worker.join()
            left = list(Path(folder).glob(".*"))
            inside += bool(left)
            problems += _torn(Path(folder), range(_KEYS), _LARGE_LINES, "killed")
            problems += _served(folder, chance.randrange(_KEYS))
            for path in left:
                path.unlink()
    print(f"{kills} kills, {inside} of them in the middle of a write: {len(problems)} problems")
    return problems


def _served(folder: str, key: int) -> list[str]:
    """What is wrong with what a reader gets after the kill."""
    source = _source(key, _LARGE_LINES)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        path = cache.store(source, "killed", folder)
    if caught or path.read_text() != source:
        return [f"{path.name} was torn: {caught}"]
    return []


# damaged files
def flipped(flips: int, seed: int = 0) -> list[str]:
    """What went unnoticed when single bytes of entries were changed on disk."""
    chance, problems, noticed = random.Random(seed), [], 0
    with tempfile.TemporaryDirectory() as folder:
        for number in range(flips):
            problem = _flip(folder, number, chance)
            problems += [problem] if problem else []
            noticed += not problem
    print(f"{flips} single-byte flips: {noticed} noticed, written again and warned about once")
    return problems


def _flip(folder: str, number: int, chance: random.Random) -> str:
    """Change a byte of one entry; what is wrong with what comes then."""
    source = _source(number, 30)
    path = cache.store(source, "flipped", folder)
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= chance.randrange(1, 256)
    path.write_bytes(data)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = cache.load(cache.store(source, "flipped", folder), source)
        cache.store(source, "flipped", folder)
    if len(caught) != 1 or path.name not in str(caught[0].message):
        return f"{path.name}: {len(caught)} warnings"
    if path.read_text() != source or number != module.VALUE:
        return f"{path.name} was not written again"
    return ""


def main(arguments: Sequence[str]) -> int:
    """Run all parts, or those named; 0 if nothing went wrong."""
    parser = argparse.ArgumentParser(prog="python -m moec.fuzz.cache_stress", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="concurrent|killed|flipped")
    parser.add_argument("--processes", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    parts: dict[str, Callable[[], list[str]]] = {
        "concurrent": lambda: concurrent(given.processes, given.rounds, given.seed),
        "killed": lambda: killed(given.kills, given.seed),
        "flipped": lambda: flipped(given.flips, given.seed),
    }
    problems = [p for name in given.parts or parts for p in parts[name]()]
    print("\n".join(problems) or "nothing went wrong")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
