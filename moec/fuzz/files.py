"""Mutated files for every parser and loader: each is taken, or refused with line and column.

``python -m moec.fuzz.files --count 100000 --seed 0 --jobs 2``. Input number N of a seed is always
the same; ``--only N`` repeats one. A finding is any exception but a refusal, a refusal without a
place, more than 2 s of processor time, more than 512 MB of memory, or a graph that is taken but
does not verify, does not print and read back as itself, or comes out of a pass malformed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import random
import re
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import TypeVar

import typer

from moec import cache
from moec.budget.rates import Rates
from moec.budget.rates_file import Calibration, parse_calibration, show_calibration
from moec.capture.model_spec import read_config
from moec.cli.console import calls_for
from moec.cli.graphs import read_sizes
from moec.codegen import emit_module
from moec.codegen.triton.tiles import Tile
from moec.errors import CodegenError, DimError, MoecError
from moec.files import decoded
from moec.fuzz.mutate import mutated
from moec.ir.dims import parse_dim, show_dim
from moec.ir.graph import Graph, Value
from moec.ir.lexer import MAX_BYTES
from moec.ir.parser import parse_file
from moec.ir.text import show
from moec.ir.verify import verify
from moec.manager import PassManager, parse_pipeline
from moec.pipeline import pipeline
from moec.reproducer import check_of, emission_of
from moec.tuning.file import Entry, Tuning, parse_tuning, show_tuning
from moec.tuning.kernels import Kernel

_T = TypeVar("_T")
SEEDS = Path(__file__).parents[2] / "tests" / "corpus" / "seeds"
SECONDS, HARD_SECONDS, MEGABYTES = 2.0, 20, 512
PLACE = re.compile(r"\A[^\n]*?:\d+:\d+: ")
_CLEAN = "simplify, cse, dce"
_NAME = "fuzz.moe"


class Finding(Exception):
    """What is wrong with how an input was taken."""


# formats: each takes the bytes of an input and says what became of it
def read_graphs(data: bytes) -> str:
    """A file of IR: refused with a place, or graphs that verify and read back."""
    graphs = _placed(lambda: parse_file(decoded(data, _NAME, MAX_BYTES), _NAME))
    for graph in graphs:
        _check_graph(graph)
        if hashlib.sha256(data).digest()[0] < 64:
            _check_passes(graph)
    return "taken" if graphs else "empty"


def _check_graph(graph: Graph) -> None:
    try:
        verify(graph)
    except MoecError as error:
        raise Finding(f"the parser took what the verifier refuses: {error}") from error
    text = show(graph)
    (again,) = parse_file(text, "printed")
    if _meaning(again) != _meaning(graph) or show(again) != text:
        raise Finding("printed text reads back as another graph")


def _meaning(graph: Graph) -> list[object]:
    """All that a graph says but names, without the way through its text."""
    numbers: dict[Value, int] = {}

    def number(value: Value | None) -> object:
        return value if value is None else (numbers.setdefault(value, len(numbers)), value.type)

    def values(found: Sequence[Value | None]) -> tuple[object, ...]:
        return tuple(map(number, found))

    said: list[object] = [dict(graph.ranges), values(graph.inputs), values(graph.cotangents)]
    for op in graph.ops:
        attrs = {name: repr(value) for name, value in op.attrs.items()}
        inner = _meaning(op.body) if op.body is not None else None
        said.append((op.kind, values(op.operands), attrs, inner, values(op.results), str(op.loc)))
    return [*said, values(graph.outputs), values(graph.gradients)]


def _check_passes(graph: Graph) -> None:
    """Cleaning passes keep the rules; code emitted for the result is Python."""
    with contextlib.suppress(DimError):  # a size that grows beyond what dims may be
        result = verify(PassManager(_CLEAN).run(graph))
        with contextlib.suppress(CodegenError):
            compile(emit_module(result, "aten"), "emitted.py", "exec")


def read_run_line(data: bytes) -> str:
    """What a file asks for: passes, a check, code for a target."""
    text = _placed(lambda: decoded(data, _NAME, MAX_BYTES))
    _placed(lambda: calls_for(None, text, Path(_NAME), ""))
    _placed(lambda: check_of(text, _NAME))
    _placed(lambda: emission_of(text, _NAME))
    return "taken"


def read_pipeline(data: bytes) -> str:
    """Passes on the command line; what is taken reads back."""
    text = data.decode("utf-8", errors="surrogateescape")  # as Python gives arguments
    calls = _placed(lambda: parse_pipeline(text))
    if parse_pipeline(", ".join(map(str, calls))) != calls:
        raise Finding("a pipeline reads back as another")
    return "taken"


def read_dim(data: bytes) -> str:
    """One dim."""
    dim = parse_dim(data.decode("utf-8", errors="surrogateescape"))
    if parse_dim(show_dim(dim)) != dim:
        raise Finding(f"the dim {show_dim(dim)} reads back as another")
    return "taken"


def read_size(data: bytes) -> str:
    """``T=33`` on the command line."""
    read_sizes(data.decode("utf-8", errors="surrogateescape").split())
    return "taken"


def read_configuration(data: bytes) -> str:
    """A model's config.json."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_bytes(data)
        _placed(lambda: read_config(path))
    return "taken"


_EMITTED = "VALUE = 7\n" + "".join(f"def f{i}():\n    return {i}\n" for i in range(8))


def read_cache(data: bytes) -> str:
    """A cache entry with these bytes, a link or a folder of its name: never what is loaded."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cache.forget()
        path, outside = cache.store(_EMITTED, "entry", folder), Path(folder) / "outside"
        outside.write_bytes(data)
        _put(path, data, outside)
        changed = path.is_dir() or path.is_symlink() or path.read_bytes() != _EMITTED.encode()
        module = cache.load(cache.store(_EMITTED, "entry", folder), _EMITTED)
        sys.modules.pop(module.__name__)
        if (module.VALUE, module.f3(), outside.read_bytes()) != (7, 3, data):
            raise Finding("a damaged cache entry was used")
        if len(caught) != int(changed):
            raise Finding(f"{len(caught)} warnings about a damaged entry")
    return "taken"


def _put(path: Path, data: bytes, outside: Path) -> None:
    kind = hashlib.sha256(data).digest()[0] % 8
    path.unlink()
    if kind == 0:
        path.symlink_to(outside)
    elif kind == 1:
        path.mkdir()
    else:
        path.write_bytes(data)


def read_tuning(data: bytes) -> str:
    """A tuning file: refused with a place, or one that reads back."""
    made = _placed(lambda: parse_tuning(decoded(data, _NAME, MAX_BYTES), _NAME))
    if parse_tuning(show_tuning(made), _NAME) != made:
        raise Finding("a tuning file reads back as another")
    return "taken"


def read_rates(data: bytes) -> str:
    """A file of rates: refused with a place, or one that reads back."""
    made = _placed(lambda: parse_calibration(decoded(data, _NAME, MAX_BYTES), _NAME))
    if parse_calibration(show_calibration(made), _NAME) != made:
        raise Finding("a file of rates reads back as another")
    return "taken"


def _placed(read: Callable[[], _T]) -> _T:
    """The result; a refusal must name a place."""
    try:
        return read()
    except MoecError as error:
        if not PLACE.match(str(error)):
            raise Finding(f"refused without a place: {error}") from error
        raise


@dataclass(frozen=True)
class Format:
    """A kind of file or text that moec reads; ``share`` is its part of all inputs."""

    name: str
    share: int
    check: Callable[[bytes], str]
    seeds: tuple[bytes, ...]
    refusals: tuple[type[Exception], ...] = (MoecError,)


def formats(folder: Path) -> list[Format]:
    """All formats, with what their mutations start from."""
    graphs = tuple(path.read_bytes() for path in sorted(folder.glob("*.moe")))
    if not graphs:
        raise SystemExit(f"{folder} holds no .moe files to mutate")
    lines = [f"// run: {passes}\n".encode() for passes in _PIPELINES]
    lines += [b"// run: cse\n// check: seed=0, T=33\n", b"// emit: triton, try\n"]
    return [
        Format("graphs", 72, read_graphs, graphs),
        Format("run lines", 4, read_run_line, tuple(line + graphs[0] for line in lines)),
        Format("pipelines", 8, read_pipeline, tuple(p.encode() for p in _PIPELINES)),
        Format("dims", 8, read_dim, tuple(d.encode() for d in _DIMS)),
        Format("sizes", 2, read_size, (b"T=33", b"B=2 S=17"), (MoecError, typer.BadParameter)),
        Format("cache", 3, read_cache, (_EMITTED.encode(),)),
        Format("configurations", 3, read_configuration, _configurations()),
        Format("tuning", 3, read_tuning, _tunings()),
        Format("rates", 3, read_rates, _calibrations()),
    ]


_PIPELINES = (
    *(pipeline(target, training) for target in ("triton", "aten") for training in (False, True)),
    "cse, fuse-gemm{max-ops=4}, lower{block-m=16,block-n=16}  # small\n, grad{wanted=x+w}, dce",
)
_DIMS = (
    "2*T + 1",
    "ceildiv(T*8, 128)*128",
    "Min(T, 64) - floordiv(T, 3)",
    "(T + 1)^3",
    "-T + 4096",
)


def _tunings() -> tuple[bytes, ...]:
    gemm = Kernel("grouped_gemm", "bf16", 8, 64, 32, 2, gather="left", reads=1)
    outer = Kernel("grouped_outer", "f32", 8, 32, 64, transposed=True)
    tile = Tile(128, 32, 64, 8, 3)
    entries = tuple(Entry(k, "pointer", tile, 0.5, 0.75, 16, 4096) for k in (gemm, outer))
    made = Tuning("a GPU", {"triton": "3.6.0"}, "2026-11-23", entries)
    return (show_tuning(made).encode(),)


def _calibrations() -> tuple[bytes, ...]:
    rates = Rates({"bf16": 6e14, "f32": 6e13}, {"bf16": 5e14}, {"bf16": 4e14}, {}, 2.7e12, 4e-6)
    made = Calibration("a GPU", "cuda", {"torch": "2.13.0"}, "2026-11-23", rates)
    return (show_calibration(made).encode(),)


def _configurations() -> tuple[bytes, ...]:
    shared = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "dtype": "float32",
    }
    shared |= {"vocab_size": 32, "architectures": ["X"], "rope_parameters": {"rope_theta": 1e4}}
    kinds = ("olmoe", "mixtral", "qwen3_moe", "deepseek_v3")
    return tuple(json.dumps({"model_type": k, **shared}, indent=1).encode() for k in kinds)


# running
def make_input(known: Sequence[Format], seed: int, number: int) -> tuple[Format, bytes]:
    """Input number ``number`` of a seed: its format and its bytes."""
    chance = random.Random(f"{seed}:{number}")
    (chosen,) = chance.choices(known, [f.share for f in known])
    return chosen, mutated(chance, chance.choice(chosen.seeds), chosen.seeds)


def attempt(chosen: Format, data: bytes) -> tuple[str, str]:
    """What became of an input ("taken", "refused", "found"), and what is wrong with that."""
    start = time.process_time()
    try:
        result, problem = chosen.check(data), ""
    except chosen.refusals:
        result, problem = "refused", ""
    except (Exception, RecursionError, MemoryError) as error:
        frames = traceback.extract_tb(error.__traceback__)[-3:]
        where = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frames))
        result, problem = "found", f"{type(error).__name__}: {str(error)[:300]} ({where})"
    seconds = time.process_time() - start
    if seconds > SECONDS and not problem:
        result, problem = "found", f"took {seconds:.1f} s of processor time"
    return result, problem


@dataclass
class Counts:
    """What became of the inputs, by format and result; findings; and the worst of all."""

    results: Counter[tuple[str, str]] = field(default_factory=Counter)
    findings: dict[int, str] = field(default_factory=dict)
    seconds: float = 0.0
    megabytes: float = 0.0

    def add(self, other: Counts) -> None:
        """Take over what another worker counted."""
        self.results += other.results
        self.findings |= other.findings
        self.seconds = max(self.seconds, other.seconds)
        self.megabytes = max(self.megabytes, other.megabytes)

    def __str__(self) -> str:
        names = list(dict.fromkeys(name for name, _ in sorted(self.results)))
        kinds = ("taken", "empty", "refused", "found")
        lines = [f"{n}: " + ", ".join(f"{self.results[n, k]} {k}" for k in kinds) for n in names]
        worst = f"slowest {self.seconds:.2f} s, peak memory {self.megabytes:.0f} MB"
        found = [f"input {n}: {words}" for n, words in sorted(self.findings.items())]
        return "\n".join([*lines, f"{sum(self.results.values())} inputs: {worst}", *found])


def peak_megabytes() -> float:
    """The most memory that this process has held; ``getrusage`` would count its parent's, too."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def run_inputs(
    known: Sequence[Format], seed: int, numbers: Sequence[int], note: Callable[[int], None]
) -> Counts:
    """Try inputs in this process; ``note`` is called with the number of each before it is tried."""
    counts = Counts()
    for number in numbers:
        note(number)
        chosen, data = make_input(known, seed, number)
        start = time.process_time()
        result, problem = attempt(chosen, data)
        counts.seconds = max(counts.seconds, time.process_time() - start)
        peak = peak_megabytes()
        if peak > MEGABYTES >= counts.megabytes:
            result, problem = "found", problem or f"memory went up to {peak:.0f} MB"
        counts.megabytes = max(counts.megabytes, peak)
        counts.results[chosen.name, result] += 1
        if problem:
            counts.findings[number] = f"{chosen.name}: {problem}"
    return counts


def _worker(
    folder: Path, seed: int, numbers: Sequence[int], current: Synchronized[int], out: Connection
) -> None:
    def note(number: int) -> None:
        signal.setitimer(signal.ITIMER_PROF, HARD_SECONDS)  # kills this process if it is stuck
        current.value = number

    warnings.simplefilter("error")
    out.send(run_inputs(formats(folder), seed, numbers, note))


def run_in_processes(folder: Path, seed: int, count: int, jobs: int) -> Counts:
    """Try inputs 0 to ``count`` in so many processes; one that dies is a finding, too."""
    total, waiting = Counts(), [range(i, count, jobs) for i in range(jobs)]
    context = multiprocessing.get_context("spawn")
    workers = []
    for numbers in waiting:
        inside, outside = context.Pipe(duplex=False)
        current = context.Value("q", -1)
        process = context.Process(target=_worker, args=(folder, seed, numbers, current, outside))
        process.start()
        outside.close()
        workers.append((inside, current, numbers))
    for inside, current, numbers in workers:
        try:
            total.add(inside.recv())
        except EOFError:
            words = f"killed its process; the rest of {numbers} was not tried"
            total.findings[current.value] = words
    return total


def main(arguments: Sequence[str]) -> int:
    """Try mutated inputs; 0 if there was no finding."""
    parser = argparse.ArgumentParser(prog="python -m moec.fuzz.files", description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seeds", type=Path, default=SEEDS, help="folder of .moe files to mutate")
    parser.add_argument("--only", type=int, help="print and try this input alone")
    given = parser.parse_args(arguments)
    if given.only is not None:
        chosen, data = make_input(formats(given.seeds), given.seed, given.only)
        print(f"{chosen.name}\n{data!r}\n{attempt(chosen, data)}")
        return 0
    counts = run_in_processes(given.seeds, given.seed, given.count, given.jobs)
    print(counts)
    return 1 if counts.findings else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
