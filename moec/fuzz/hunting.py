"""Looking for a planted fault: the net over random graphs, bisection and reduction of what it
catches.
"""

from __future__ import annotations

import re
import tempfile
import time
from pathlib import Path

from typer.testing import CliRunner

from moec.cli.app import app
from moec.fuzz.cases import prepare
from moec.fuzz.faults import GRAPHS, Outcome
from moec.fuzz.graphs import random_graph
from moec.fuzz.net import Failure, failures
from moec.fuzz.planting import Fault
from moec.fuzz.saving import reduced
from moec.ir import Graph, show
from moec.ir.graph import walk


def hunt(fault: Fault) -> Outcome:
    """The first graph that shows the fault, and what the tools say about it."""
    prepare()
    for seed in range(GRAPHS):
        graph = random_graph(seed)
        failure = next(failures(graph, seed, (fault.target,)), None)
        if failure is not None:
            return _examined(fault, graph, failure, seed)
    return Outcome(fault.name, problem=f"in {GRAPHS} graphs")


def _examined(fault: Fault, graph: Graph, failure: Failure, seed: int) -> Outcome:
    start = time.monotonic()
    words = _bisection(fault, failure, seed)
    seconds = time.monotonic() - start
    small = reduced(failure, seed)
    kept = _ops(small.graph) / max(_ops(failure.graph), 1)
    is_named = all(re.search(re.escape(word), words) for word in fault.named)
    return Outcome(fault.name, seed, str(failure), words, is_named, seconds, kept)


def _ops(graph: Graph) -> int:
    return sum(1 for _ in walk(graph))


def _bisection(fault: Fault, failure: Failure, seed: int) -> str:
    """What ``moec bisect`` prints for the failing graph."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "failing.moe"
        path.write_text(show(failure.graph), encoding="utf-8")
        words = ["bisect", str(path), "--target", fault.target, "--seed", str(seed)]
        passes = failure.passes or ("" if failure.question.startswith("emitted") else None)
        if passes is None:
            words.append("--training")
        else:
            words += ["--passes", passes]
        result = CliRunner().invoke(app, words)
    return result.output


__all__ = ["hunt"]
