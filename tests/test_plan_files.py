"""Graph files: both formats, sizes that depend on T, and errors that name the place."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from moec.cli import app
from moec.errors import PlanError
from moec.plan import read_problem, replay


def graph(**changes: Any) -> dict[str, Any]:
    nodes = [{"id": v, "name": f"n{v}", "size": 4, "time": 1.5} for v in range(3)]
    data = {"format": "moec-remat-graph/1", "name": "g", "nodes": nodes, "edges": [[0, 1], [1, 2]]}
    return data | changes


def node(**changes: Any) -> dict[str, Any]:
    return graph(nodes=[{"id": 0, "size": 1, "time": 1} | changes], edges=[])


def test_both_formats_give_the_same_graph() -> None:
    link = {
        "graph": {"name": "g", "order": ["n0", "n1", "n2"]},
        "nodes": [{"id": f"n{v}", "cost_ram": 4, "cost_cpu": 1.5} for v in range(3)],
        "links": [{"source": "n0", "target": "n1"}, {"source": "n1", "target": "n2"}],
    }
    assert read_problem(json.dumps(link), "g") == read_problem(json.dumps(graph()), "g")


def test_sizes_are_polynomials_in_the_tokens_rounded_up() -> None:
    text = json.dumps(node(size={"T": [3, 2, 1], "round": 16}, time={"T": [0.5, 0.25]}))
    only = read_problem(text, "g", tokens=3).nodes[0]
    assert (only.size, only.duration) == (32, 1.25)
    with pytest.raises(PlanError, match=r"nodes\[0\].*tokens"):
        read_problem(text, "g")


def test_a_node_may_have_several_outputs_or_none() -> None:
    nodes = [
        {"id": 0, "size": [4, {"T": [0, 2]}, 1], "time": 1, "keep": [0, 2]},
        {"id": 1, "size": [], "time": 1},
    ]
    data = graph(nodes=nodes, edges=[[[0, 1], 1], [0, 1]])
    problem = read_problem(json.dumps(data), "g", tokens=8)
    assert problem.nodes[0].outputs == (4, 16, 1)
    assert (problem.kept, problem.reads) == ((0, 2), ((), (1, 0)))
    assert replay(problem, (0, 1)).held == (21, 21)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (node(size=-1), r"g.json: nodes\[0\].size: expected a size .* got -1"),
        (node(size=1.5), r"nodes\[0\].size"),
        (node(size=2**63), "sizes sum to"),
        (node(size="4"), r"nodes\[0\].size"),
        (node(time=-1), r"nodes\[0\].time"),
        (node(keep=1), r"nodes\[0\].keep: expected true or false"),
        (node(id=7), r"nodes\[0\].id"),
        (graph(edges=[[0, 9]]), r"edges\[0\] names node 9"),
        (node(size=[1, -1]), r"nodes\[0\].size\[1\]: expected a size"),
        (node(size=[1], keep=[1]), r"nodes\[0\].keep: expected numbers of outputs"),
        (graph(edges=[[[0, 1], 1]]), r"edges\[0\] names output 1 of node 0, which has 1"),
        (graph(edges=[[[0], 1]]), r"edges\[0\]\[0\]: expected a node, or \[node, output\]"),
        (graph(edges=[[0]]), r"edges\[0\]: expected an edge"),
        (graph(edges=[[0, 1], [1, 2], [2, 0]]), "cycle: n0 -> n1 -> n2 -> n0"),
        (graph(edges=[[1, 1]]), "cycle: n1 -> n1"),
        (graph(order=[1, 0, 2]), "order has node 1 before its input 0"),
        (graph(order=[0, 1]), "order must hold each of the 3 nodes once"),
        (graph(nodes=3), "nodes: expected a list"),
        (graph(format="other/1"), "format"),
        ([], "expected an object"),
        ({}, "nodes"),
    ],
)
def test_malformed_graphs_are_refused_with_the_place(data: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        read_problem(json.dumps(data), "g.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"nodes": [\n  {]}', r"g.json:2:4: "),
        ('{"nodes": [{"id": 0, "size": 1, "time": NaN}]}', "NaN is no number"),
        ('{"nodes": [{"id": 0, "cost_ram": 1, "cost_cpu": 1e999}]}', "finite"),
        ("[" * 100000, "cannot be read"),
        ("", "g.json:1:1"),
    ],
)
def test_what_is_no_json_is_refused_with_the_place(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        read_problem(text, "g.json")


def run(folder: Path, *options: str, data: Any = None) -> tuple[int, str]:
    path = folder / "g.json"
    path.write_text(json.dumps(data or graph()))
    done = CliRunner().invoke(app, ["plan", str(path), *options])
    return done.exit_code, done.output


def test_the_command_writes_a_schedule_that_replays(tmp_path: Path) -> None:
    output = tmp_path / "s.json"
    code, text = run(tmp_path, "--budget", "100%", "-o", str(output))
    assert (code, "optimal" in text) == (0, True)
    schedule = json.loads(output.read_text())
    problem = read_problem(json.dumps(graph()), "g")
    assert replay(problem, schedule["seq"]).peak == schedule["facts"]["peak"] == 8


@pytest.mark.parametrize(
    ("budget", "code", "message"),
    [("7", 1, "least budget known to suffice is 8"), ("lots", 2, "expected bytes"), ("8B", 0, "")],
)
def test_exit_codes(tmp_path: Path, budget: str, code: int, message: str) -> None:
    found = run(tmp_path, "--budget", budget, "--time-limit", "1")
    assert (found[0], message in " ".join(found[1].split())) == (code, True)
