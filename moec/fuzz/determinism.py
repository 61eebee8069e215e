"""The same model compiled in fresh processes: the same bytes whatever their hash seed.

``python -m moec.fuzz.determinism --processes 20`` compiles a few blocks in so many processes with
random ``PYTHONHASHSEED`` and compares digests of the IR (captured and lowered), of the emitted
modules and of their names in the cache, for both targets, forward and training.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from moec import cache
from moec.capture.model_spec import load_small
from moec.capture.regions import find_regions
from moec.codegen import emit_module
from moec.ir.graph import Graph
from moec.ir.text import show
from moec.manager import PassManager
from moec.pipeline import pipeline

MODELS = ("olmoe", "deepseek_v3", "gpt_oss")
_MODES = tuple((target, training) for target in ("triton", "aten") for training in (False, True))


def digests(model: nn.Module, folder: str) -> dict[str, str]:
    """A digest of each thing that a compilation makes, by what it is."""
    found = {}
    for region in find_regions(model):
        if region.graph is not None:
            graph = region.graph
            found[f"{region.name} captured"] = _digest(show(graph))
            for target, training in _MODES:
                name = f"{region.name} {target} {'training' if training else 'forward'}"
                for part, text in _made(graph, target, training, folder):
                    found[f"{name} {part}"] = _digest(text)
    return found


def _made(graph: Graph, target: str, training: bool, folder: str) -> Iterator[tuple[str, str]]:
    """What is made of a graph, by part; a plan of memory will be one more."""
    lowered = PassManager(pipeline(target, training)).run(graph)
    source = emit_module(lowered, target)
    yield "IR", show(lowered)
    yield "kernels", source
    yield "cache key", cache.store(source, f"{graph.name}_{target}", folder).name


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _print_digests(models: Sequence[str]) -> None:
    warnings.simplefilter("ignore")  # other processes say the same
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        found = {name: digests(load_small(name).model, folder) for name in models}
    print(json.dumps(found, sort_keys=True))


def _in_process(models: Sequence[str], seed: int) -> dict[str, dict[str, str]]:
    """The digests that a fresh process with this hash seed finds."""
    words = [sys.executable, "-m", "moec.fuzz.determinism", "--print", *models]
    environment = {**os.environ, "PYTHONHASHSEED": str(seed), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"hash seed {seed}: {done.stderr[-2000:]}")
    data: dict[str, dict[str, str]] = json.loads(done.stdout)
    return data


def differences(models: Sequence[str], processes: int, seed: int = 0) -> list[str]:
    """What differs between processes; hash seeds are drawn from ``seed``."""
    chance, problems = random.Random(seed), []
    first = _in_process(models, chance.randrange(1 << 32))
    for _ in range(processes - 1):
        hash_seed = chance.randrange(1 << 32)
        other = _in_process(models, hash_seed)
        for name in models:
            keys = sorted(first[name].keys() | other[name].keys())
            wrong = [k for k in keys if first[name].get(k) != other[name].get(k)]
            problems += [f"{name}: {k} differs with PYTHONHASHSEED={hash_seed}" for k in wrong]
    parts = sum(map(len, first.values()))
    print(f"{processes} processes, {parts} things compared: {len(problems)} differences")
    return problems if parts else ["nothing was compiled"]


def main(arguments: Sequence[str]) -> int:
    """Compare; 0 if all processes made the same."""
    parser = argparse.ArgumentParser(prog="python -m moec.fuzz.determinism", description=__doc__)
    parser.add_argument("models", nargs="*", default=MODELS, help="as for moec explain")
    parser.add_argument("--processes", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--print", action="store_true", help="print this process's digests")
    given = parser.parse_args(arguments)
    if given.print:
        _print_digests(given.models)
        return 0
    problems = differences(given.models, given.processes, given.seed)
    print("\n".join(problems) or "nothing differs")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
