"""Tiles: constraints, ranking, tuning files, and what ``lower`` makes of them."""

from __future__ import annotations

import itertools
import json
import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import moec
from benchmarks.emitted_check import SHAPES, Shape, block_graph
from moec.cli import app
from moec.codegen import emit_module
from moec.codegen.triton.choose import misfit
from moec.codegen.triton.tiles import Tile
from moec.errors import CompileError, ParseError
from moec.ir import Graph, show
from moec.manager import PassManager
from moec.pipeline import pipeline
from moec.runtime.artifact import build
from moec.session import Session
from moec.tuning import file as tuning_file
from moec.tuning import worker
from moec.tuning.cost import ranked
from moec.tuning.file import Entry, Tuning, load_tuning, parse_tuning, show_tuning
from moec.tuning.kernels import GEMM, OUTER, Kernel, kernel_of
from moec.tuning.search import all_sizes, lowered, tune_graph, tuning_of, wanted
from moec.tuning.space import (
    DEPTHS,
    SIDES,
    STAGE_COUNTS,
    TEMPLATES,
    WARPS,
    gluon_tile_of,
    refusal,
    tiles,
)
from moec.tuning.timing import Timer
from tests.models import build as build_model

SMALL = Shape(64, 32, 4, 2)
KERNELS = (
    Kernel(GEMM, "bf16", 128, 1536, 256, 2, gather="left"),
    Kernel(GEMM, "bf16", 8, 48, 24, transposed=True, reads=2),
    Kernel(GEMM, "f32", 4, 64, 32, 2),
    Kernel(GEMM, "f64", 4, 16, 8, 1),
    Kernel(OUTER, "bf16", 128, 512, 1536, gather="right"),
    Kernel(OUTER, "f32", 4, 24, 40),
)


@pytest.fixture(autouse=True)
def warn_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test gets its own warnings."""
    monkeypatch.setattr(tuning_file, "_warned", set())


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_the_solver_finds_what_brute_force_finds(kernel: Kernel, template: str) -> None:
    space = itertools.product(SIDES, SIDES, DEPTHS, WARPS, STAGE_COUNTS)
    every = [Tile(*sizes) for sizes in space]
    every += [Tile(128, 256 // kernel.parts, 64, 4, 4, group) for group in (4, 8, 16, 32, 64)]
    expected = {tile for tile in every if not refusal(kernel, template, tile)}
    found = list(tiles(kernel, template))
    assert set(found) == expected and len(found) == len(expected)


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 4096])
def test_ranking_is_deterministic_and_of_possible_tiles(kernel: Kernel, rows: int) -> None:
    found = ranked(kernel, TEMPLATES, rows)
    assert found == ranked(kernel, reversed(TEMPLATES), rows)
    assert all(c.ms >= 0 and not refusal(kernel, c.template, c.tile) for c in found)


def test_wide_tiles_rank_before_narrow_ones_where_rows_are_many() -> None:
    (best, *_) = ranked(KERNELS[0], ("tma",), 1 << 18)
    assert best.tile.rows >= 128 and best.tile.depth >= 64


# files
def entry(kernel: Kernel, **changes: Any) -> Entry:
    made = Entry(kernel, "pointer", Tile(32, 16, 16, 4, 2), 1.5, 2.0, 16, 1 << 20)
    return replace(made, **changes)


def tuning(*entries: Entry) -> Tuning:
    return Tuning("a GPU", {"triton": "3.6.0"}, "2026-11-23", entries)


def test_a_file_reads_back() -> None:
    for entries in ((), tuple(map(entry, KERNELS))):
        made = tuning(*entries)
        assert parse_tuning(show_tuning(made), "a.json") == made


def damaged() -> Iterator[tuple[str, int, int]]:
    """Texts that are no tuning files, and where they go wrong."""
    text = show_tuning(tuning(entry(KERNELS[0]), entry(KERNELS[1])))
    second = text.count("\n") - 2  # the line of the last entry
    yield "", 1, 1
    yield "[]", 1, 1
    yield text.replace("moec-tuning/1", "moec-tuning/2"), 1, 1
    yield text.replace('"triton"', "triton"), 4, 15
    for old, new in (
        ('"reads": 2', '"reads": -2'),
        ('"depth": 48', '"depth": 1e99'),
        ('"depth": 48', '"depth": null'),
        ('"transposed": true', '"transposed": 1'),
        (
            '[32, 16, 16, 4, 2], "ms": 1.5, "default_ms": 2.0}\n',
            '[32], "ms": 1, "default_ms": 2}\n',
        ),
        ('"ms": 1.5, "default_ms": 2.0}\n', '"ms": NaN, "default_ms": 2.0}\n'),
        ('"kind": "grouped_gemm", "dtype": "bf16", "experts": 8,', '"experts": 8,'),
    ):
        assert old in text
        yield text.replace(old, new), second, 3


@pytest.mark.parametrize("text, line, column", list(damaged()))
def test_damage_has_a_place_and_one_warning(
    text: str, line: int, column: int, tmp_path: Path
) -> None:
    with pytest.raises(ParseError, match=rf"^a\.json:{line}:{column}: "):
        parse_tuning(text, "a.json")
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.warns(UserWarning, match=rf"a\.json:{line}:{column}: .*; tiles are chosen by rule"):
        assert load_tuning(str(path)) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_tuning(str(path)) is None


def test_a_missing_file_is_a_warning(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="No such file"):
        assert load_tuning(str(tmp_path / "none.json")) is None


@pytest.mark.parametrize(
    "change, words",
    [({"device": "another"}, "measured on another"), ({"versions": {}}, "with triton unknown")],
)
def test_what_was_measured_elsewhere_is_left_aside(
    change: dict[str, Any],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = tmp_path / "a.json"
    path.write_text(show_tuning(replace(tuning(), **change)))
    assert load_tuning(str(path)) is not None  # no GPU here: nobody knows better
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a GPU")
    with caplog.at_level(logging.INFO, "moec.kernels"):
        assert load_tuning(str(path)) is None
    assert words in caplog.text


# in lower
def kernels_of(graph: Graph) -> list[Kernel]:
    return [kernel for op in graph.ops if (kernel := kernel_of(op)) is not None]


def ready(tokens: int = 1 << 16) -> Graph:
    graph = replace(block_graph(SMALL), ranges={"T": (0, tokens)})
    return PassManager(pipeline("triton", True)).run(graph)


def with_tuning(graph: Graph, path: Path, made: Tuning, more: str = "") -> Graph:
    path.write_text(show_tuning(made))
    return PassManager(f"lower{{tuning={path}{more}}}").run(graph)


def tiles_in(graph: Graph) -> set[tuple[int, ...]]:
    return {op.attrs["tile"] for op in graph.ops if kernel_of(op) is not None}


def test_lower_uses_what_was_measured_and_the_cache_knows_it(tmp_path: Path) -> None:
    graph, path = ready(), tmp_path / "a.json"
    made = with_tuning(graph, path, tuning(*map(entry, kernels_of(graph))))
    assert tiles_in(made) == {(32, 16, 16, 4, 2)} != tiles_in(graph)
    paths = {build(g, "triton", "training", (), tmp_path).path for g in (graph, made)}
    assert len(paths) == 2


@pytest.mark.parametrize("more", [",repro=true", ",block-m=64"])
def test_other_wishes_go_first(more: str, tmp_path: Path) -> None:
    graph = ready()
    plain = PassManager(f"lower{{{more[1:]}}}").run(graph)
    made = with_tuning(graph, tmp_path / "a.json", tuning(*map(entry, kernels_of(graph))), more)
    assert show(made) == show(plain)


@pytest.mark.parametrize(
    "change",
    [
        {"tile": Tile(256, 256, 128, 4, 5)},
        {"tile": Tile(33, 16, 16, 4, 2)},
        {"tile": Tile(32, 16, 16, 4, 1 << 30)},
        {"tile": Tile(0, 0, 0, 0, 0)},
        {"template": "tma", "tile": Tile(64, 16, 16, 4, 2)},
        {"template": "gluon"},
        {"low": 1 << 20},
    ],
    ids=str,
)
def test_what_a_kernel_cannot_have_changes_nothing(change: dict[str, Any], tmp_path: Path) -> None:
    graph = ready(1 << 16)
    entries = [entry(k, **change) for k in kernels_of(graph)]
    assert show(with_tuning(graph, tmp_path / "a.json", tuning(*entries))) == show(graph)


def test_of_several_entries_the_one_of_most_rows_counts() -> None:
    kernel = KERNELS[0]
    few, many = entry(kernel, low=1, high=64), entry(kernel, low=1024, high=4096)
    assert tuning(few, many).find(kernel, None) is many
    assert tuning(many, few).find(kernel, 512) is few
    assert tuning(few).find(KERNELS[1], None) is None


@pytest.mark.parametrize("value", [7, "", "a,b", "a}", True])
def test_the_option_is_a_path(value: object) -> None:
    with pytest.raises(CompileError, match="option 'tuning'"):
        moec.compile(build_model("olmoe"), options={"tuning": value})


def test_the_option_reaches_lower_and_not_repro(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "tuning=/a.json" in pipeline("triton", True, tuning="/a.json")
    assert "tuning" not in pipeline("triton", True, repro=True, tuning="/a.json")
    assert "tuning" not in pipeline("aten", True, tuning="/a.json")
    session = Session(tuning="/a.json")
    assert session._drop_tuning(None) and not session._drop_tuning(None)  # type: ignore[arg-type]


# measuring
class Fake:
    """Times that say that one tile of each kernel is the best; others do not run."""

    def __init__(self, refused: tuple[int, ...] = (), lies: bool = False) -> None:
        self.calls, self.refused, self.lies = 0, refused, lies

    def __call__(self, graph: Graph, seconds: float) -> Sequence[float] | str:
        self.calls += 1
        assert emit_module(graph, "triton")
        kernels = [(kernel_of(op), op.attrs.get("tile", ())) for op in graph.ops]
        if any(k is not None and tile == self.refused for k, tile in kernels):
            return "out of resources"
        if self.lies and self.calls > 3:
            return [1.0] * len(graph.ops)
        return [1.0 if k is None else 1e-3 * sum(tile) for k, tile in kernels]


def searched(measure: Fake, seconds: float = 1e3) -> tuple[list[Any], list[str]]:
    graph, said = ready(), list[str]()
    kernels = wanted(graph, all_sizes(graph, 512), ("pointer",), 4)
    deadline = time.monotonic() + seconds
    return tune_graph(graph, kernels, measure, deadline, said.append), said


def test_the_fastest_candidate_wins() -> None:
    best, _ = searched(Fake())
    for b in best:
        everything = [b.wanted.default, *b.wanted.others]
        assert sum(b.chosen.tile.attribute) == min(sum(c.tile.attribute) for c in everything)
    made = tuning_of(best, "a GPU")
    assert parse_tuning(show_tuning(made), "a.json").entries[0].kernel == best[0].wanted.kernel


def test_what_wins_only_once_is_dropped() -> None:
    best, _ = searched(Fake(lies=True))
    assert all(b.chosen is b.wanted.default and b.ms == b.default_ms for b in best)


def test_what_does_not_run_is_noted_and_stops_nothing() -> None:
    (first, *_) = wanted(ready(), all_sizes(ready(), 512), ("pointer",), 4)
    refused = first.others[0].tile
    best, _ = searched(Fake(refused.attribute))
    assert best and all(b.chosen.tile != refused for b in best)
    assert f"{refused}: out of resources" in best[0].failed


def test_no_time_leaves_the_default() -> None:
    best, _ = searched(Fake(), seconds=0.0)
    assert all(b.chosen is b.wanted.default for b in best)


def test_a_graph_that_does_not_run_is_reported() -> None:
    best, said = searched(Fake(next(iter(tiles_in(ready())))))
    assert not best and said == ["@block does not run: out of resources"]


def test_a_worker_that_cannot_run_a_graph_says_why() -> None:
    graph = ready()
    with Timer(all_sizes(graph, 4), seconds=60) as timer:
        words = timer(graph, 60)
        assert isinstance(words, str) and words != "ended its process"
        timer.seconds = 0.0
        assert "stopped after" in str(timer(graph, 0.0))


def test_a_worker_refuses_a_graph_with_other_results() -> None:
    inputs, wide = worker._Inputs(), torch.randn(3, 1 << 20)
    inputs.compare([torch.ones(2, 3), wide])
    inputs.compare([torch.ones(2, 3), wide * 1.001])
    for wrong in (wide * 1.1, wide * torch.nan, torch.zeros_like(wide)):
        with pytest.raises(ValueError, match="result 1 is another than before"):
            inputs.compare([torch.ones(2, 3), wrong])


def test_gluon_has_one_tile() -> None:
    graph = PassManager(pipeline("triton", True, True, gluon=True)).run(
        block_graph(SHAPES["s7b-n256"])
    )
    for op in graph.ops:
        kernel = kernel_of(op)
        if kernel is not None:
            tile = gluon_tile_of(kernel)
            assert tile.attribute == op.attrs["tile"]
            assert not refusal(kernel, "gluon", tile) and not misfit(op, kernel, "gluon", tile)
            assert refusal(kernel, "gluon", replace(tile, stages=3))
            assert misfit(op, kernel, "gluon", replace(tile, stages=3))
            wider = replace(tile, group=32)
            assert not refusal(kernel, "gluon", wider) and not misfit(op, kernel, "gluon", wider)
            assert refusal(kernel, "gluon", replace(tile, group=5))
            assert all(misfit(op, kernel, "gluon", replace(tile, group=n)) for n in (0, 65))


def test_without_a_gpu_the_command_ranks_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "a.moe"
    path.write_text(show(block_graph(Shape(512, 256, 8, 2))))
    run = CliRunner().invoke(app, ["tune", str(path), "--dry-run", "--tokens", "4096"])
    assert run.exit_code == 0 and run.output.count("ms by the cost model: ") == 6 * 6
    run = CliRunner().invoke(app, ["tune", str(path), "-o", str(tmp_path / "b.json")])
    assert run.exit_code == 1 and "measures on a GPU" in run.output
    assert not (tmp_path / "b.json").exists()


def test_lowered_takes_kernels_as_they_are() -> None:
    graph = ready()
    assert lowered(graph, True, False, False) is graph


def test_shipped_files_are_good() -> None:
    for path in Path(tuning_file.__file__).parent.glob("*.json"):
        made = parse_tuning(path.read_text(), path.name)
        assert all(not refusal(e.kernel, e.template, e.tile) for e in made.entries)
        assert json.loads(path.read_text())["device"] == made.device
