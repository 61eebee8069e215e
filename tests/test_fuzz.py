"""A small fixed share of the fuzzing that `make fuzz` does, and that its net is tight."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moec.fuzz import modules, net
from moec.fuzz.fault_list import FAULTS
from moec.fuzz.faults import in_process
from moec.fuzz.graphs import random_graph
from moec.fuzz.planting import ROOT, Fault
from moec.fuzz.saving import problem_of_file, reduced, save
from moec.fuzz.styles import MoeBlock
from moec.ir import show, verify
from moec.manager import PassManager
from moec.pipeline import RAISE


@pytest.mark.parametrize("seed", range(8))
def test_whole_pipelines(seed: int) -> None:
    assert not [str(f) for f in net.failures(random_graph(seed), seed)]


@pytest.mark.parametrize("seed", range(100, 108))
def test_passes_alone(seed: int) -> None:
    assert not [str(f) for f in net.pass_failures(random_graph(seed), seed)]


@pytest.mark.parametrize("seed", range(4))
def test_modules(seed: int) -> None:
    assert modules.problem_of_style(modules.random_style(seed), seed) == ""


def test_a_seed_gives_the_same_graph() -> None:
    assert show(random_graph(7)) == show(random_graph(7))
    assert show(random_graph(7)) != show(random_graph(8))


def test_graphs_are_valid_and_varied() -> None:
    graphs = [verify(random_graph(seed)) for seed in range(40)]
    kinds = {op.kind for graph in graphs for op in graph.ops}
    assert len(kinds) > 60
    assert {"moe.limit", "moe.row_dot", "moe.unpermute", "t.merge", "t.matmul"} <= kinds


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: str(fault.name))
def test_the_line_of_a_fault_is_there(fault: Fault) -> None:
    assert fault.planted((ROOT / fault.source).read_text()) != ""


@pytest.mark.parametrize(
    "name", ["half-of-a-dot", "permute-taken-for-identity", "last-row-of-a-block"]
)
def test_a_planted_fault_is_found_and_named(name: str) -> None:
    fault = next(f for f in FAULTS if f.name == name)
    outcome = in_process(fault)
    assert outcome.is_found, outcome.problem
    assert outcome.is_named, outcome.bisection
    assert outcome.kept < 0.5


def test_a_failure_is_saved_as_a_file_that_is_asked_again(tmp_path: Path) -> None:
    """A pass that raises is the failure; once it is gone, so is what the file asks."""
    graph = random_graph(3)
    failure = net.Failure(
        "passes", graph, "no-such-pass", net.pass_problem(graph, "no-such-pass", 3)
    )
    path = save(reduced(failure, 3), 3, tmp_path)
    assert "unknown pass 'no-such-pass'" in problem_of_file(path)
    path.write_text(path.read_text().replace("// run: no-such-pass", f"// run: {RAISE}"))
    assert problem_of_file(path) == ""


def test_a_wrong_module_is_found_and_its_options_are_reduced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = modules._problem_of_call

    def wrong(original: MoeBlock, *rest: Any) -> str:
        return real(original, *rest) or ("made up" if original.options.gated else "")

    monkeypatch.setattr(modules, "_problem_of_call", wrong)
    seed = next(s for s in range(99) if modules.random_style(s).gated)
    (problem,) = modules.problems_of(seed, tmp_path)
    assert "made up" in problem
    saved = json.loads((tmp_path / f"module-{seed}.json").read_text())["options"]
    assert saved == {**saved, "gated": True, "shared": "none", "score": "softmax"}
    monkeypatch.undo()
    assert modules.problem_of_saved(tmp_path / f"module-{seed}.json") == ""


def test_meaning_is_asked_at_awkward_routings() -> None:
    graph = random_graph(5)
    raised = PassManager(RAISE).run(graph)
    assert net.meaning_problem(graph, raised, 5) == ""
    outputs = raised.outputs
    other = next(
        (v for op in raised.ops for v in op.results if v.type == outputs[0].type), outputs[0]
    )
    wrong = replace(raised, outputs=(other, *outputs[1:]))
    if other is not outputs[0]:
        assert "differs" in net.meaning_problem(graph, wrong, 5)
