"""A module with tiles of a tuning file, against its own meaning, at awkward numbers of tokens."""

import time
from pathlib import Path

import pytest
import torch

from moec.codegen.triton.tiles import Tile
from moec.inputs import random_inputs
from moec.ir import Graph
from moec.runtime.artifact import Artifact
from moec.session import Session
from moec.tuning.file import Entry, Tuning, show_tuning
from moec.tuning.kernels import GEMM, kernel_of
from moec.tuning.search import all_sizes, tune_graph, wanted
from moec.tuning.timing import Timer
from tests.graphs import MIXTRAL, OLMOE, build

from .emitted import SMALL, built, check, lowered


def tuned(graph: Graph, path: Path) -> Graph:
    """The graph with a tile of its own for each kind of product."""
    ready = lowered(graph, SMALL)
    entries = []
    for kernel in filter(None, map(kernel_of, ready.ops)):
        tile = Tile(16, 16, 16, 4, 3) if kernel.kind == GEMM else Tile(16, 16, 64, 8, 2)
        entries.append(Entry(kernel, "pointer", tile, 1.0, 2.0, 0, 1 << 30))
    path.write_text(show_tuning(Tuning("a GPU", {}, "2026-11-23", tuple(entries))))
    made = lowered(graph, f"tuning={path}")
    tiles = {op.attrs["tile"] for op in made.ops if kernel_of(op)}
    assert tiles == {(16, 16, 16, 4, 3), (16, 16, 64, 8, 2)}
    return made


def test_tiles_that_do_not_run_give_way_to_the_rules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(made: Artifact, inputs: object) -> None:
        if any(step.call.options.get("tuning") for step in made.history):
            raise RuntimeError("out of resources")

    monkeypatch.setattr("moec.session.choose_target", lambda asked, device: "triton")
    monkeypatch.setattr(Artifact, "try_out", fails)
    graph, path = build(OLMOE).graph, tmp_path / "a.json"
    tuned(graph, path)
    session = Session(cache=str(tmp_path), tuning=str(path))
    inputs = random_inputs(graph, {"T": 3})
    with pytest.warns(UserWarning, match="tiles by rule take over"):
        made = session.artifact(graph, None, torch.device("cpu"), inputs)
    assert made is not None and made.target == "triton"
    assert not any("tuning" in step.call.options for step in made.history)


def test_a_worker_times_each_kernel_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moec.tuning.timing.ROUNDS", 1)
    graph = lowered(build(OLMOE).graph, SMALL)
    kernels = wanted(graph, sizes := all_sizes(graph, 4), ("pointer",), 1)
    with Timer(sizes) as timer:
        best = tune_graph(graph, kernels, timer, time.monotonic() + 100, lambda words: None)
    assert {b.wanted.kernel for b in best} == set(filter(None, map(kernel_of, graph.ops)))
    assert all(b.ms > 0 and not b.failed for b in best)


@pytest.mark.parametrize("tokens, routing", [(0, "random"), (1, "random"), (33, "one")])
@pytest.mark.parametrize("options", [OLMOE, MIXTRAL], ids=["olmoe", "mixtral"])
def test_tuned_tiles_change_no_result(
    options: object, tokens: int, routing: str, tmp_path: Path
) -> None:
    block = build(options)  # type: ignore[arg-type]
    graph = tuned(block.graph, tmp_path / "a.json")
    check(block, graph, built(graph, tmp_path), tokens, routing)
