"""One fuzzing case in a worker process: from kind and seed to what is wrong."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from moec.fuzz import modules, net, saving
from moec.fuzz.graphs import random_graph

Found = tuple[str, int, list[str]]  # kind, seed, what is wrong


def prepare() -> None:
    """Once in each worker: cases run side by side, so each has one thread; memory that nothing
    wrote is NaN, so that nobody reads it unseen.
    """
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation.*")


def answer(case: tuple[str, int], folder: Path) -> Found:
    """What is wrong with a case, with the files that failures were saved in."""
    kind, seed = case
    ask: dict[str, Callable[[int, Path], list[str]]] = {
        "graphs": partial(_graph, alone=False),
        "passes": partial(_graph, alone=True),
        "modules": modules.problems_of,
    }
    return kind, seed, ask[kind](seed, folder)


def _graph(seed: int, folder: Path, alone: bool) -> list[str]:
    targets = ("aten", "triton") if os.environ.get("TRITON_INTERPRET") == "1" else ("aten",)
    graph = random_graph(seed)
    found = net.pass_failures(graph, seed) if alone else net.failures(graph, seed, targets)
    problems = []
    for failure in found:
        small = saving.reduced(failure, seed)
        path = saving.save(small, seed, folder)
        problems.append(f"{failure}\n  {len(small.graph.ops)} ops in {path}")
    return problems


__all__ = ["Found", "answer", "prepare"]
