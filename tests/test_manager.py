"""Pipelines as text, options, the history of a run, observers, and fuel."""

from __future__ import annotations

from typing import Any

import pytest

from moec import fuel
from moec.errors import IRError, PassError
from moec.ir import Graph, parse
from moec.manager import (
    PassCall,
    PassDef,
    PassManager,
    Step,
    all_passes,
    find_pass,
    parse_pipeline,
)
from moec.pipeline import pipeline
from moec.rewrite import fixpoint, topological, transform
from tests.graphs import OLMOE, build

CHAIN = """
graph @chain(%x: f32[T]) {
  %a = t.neg(%x) : f32[T]
  %b = t.abs(%a) : f32[T]
  %c = t.neg(%b) : f32[T]
  %d = t.abs(%c) : f32[T]
  return %d
}"""


def test_every_pass_has_a_summary_of_one_line() -> None:
    for name, definition in all_passes().items():
        summary = definition.doc.split("\n\n")[0]
        assert summary.endswith("."), name
        assert definition.name == name
        assert definition.leaves <= {"t", "moe", "kern"}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("target", ["aten", "triton"])
def test_pipelines_parse_and_print_back(target: str, training: bool) -> None:
    text = pipeline(target, training)
    calls = parse_pipeline(text)
    assert [c.definition.name for c in calls] == [t.split("{")[0] for t in text.split(", ")]
    assert ("grad" in text) == training
    assert ("fuse-gemm" in text) == (target == "triton")
    assert parse_pipeline(",".join(map(str, calls))) == calls


def test_options_comments_and_lines() -> None:
    calls = parse_pipeline(
        """
        cse, fuse-gemm{max-ops=4},   # as many as that
        grad{ wanted = x+w },
        dce,
        """
    )
    assert [c.definition.name for c in calls] == ["cse", "fuse-gemm", "grad", "dce"]
    assert [c.options for c in calls] == [{}, {"max_ops": 4}, {"wanted": "x+w"}, {}]
    assert [str(c) for c in calls] == ["cse", "fuse-gemm{max-ops=4}", "grad{wanted=x+w}", "dce"]
    assert parse_pipeline("") == [] == parse_pipeline("# nothing\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("csse", "unknown pass 'csse'; passes: adjoint, "),
        ("cse dce", "cannot read the pipeline at 'cse dce'"),
        ("cse,,dce", "cannot read the pipeline at ',dce'"),
        ("cse{", "cannot read the pipeline"),
        ("Cse", "cannot read the pipeline"),
        ("fuse-gemm{ops=4}", "has no option 'ops'; options: max-ops"),
        ("cse{fast}", "has no option 'fast'; options: none"),
        ("fuse-gemm{max-ops=four}", "'four' is no int"),
        ("fuse-gemm{max-ops}", "'' is no int"),
    ],
)
def test_malformed_pipelines_say_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(PassError, match=message.replace("{", r"\{")):
        parse_pipeline(text)


def test_options_of_all_types() -> None:
    def options(graph: Graph, *, on: bool = False, size: float = 1.5, name: str = "") -> Graph:
        return graph

    definition = PassDef("options", options, frozenset())
    assert definition.options == {"on": False, "size": 1.5, "name": ""}
    assert str(PassCall(definition, {"on": True, "size": 2.0})) == "options{on=true,size=2.0}"


def test_history_keeps_every_step() -> None:
    manager = PassManager("dce, cse, raise-router, cse")
    graph = build(OLMOE).graph
    after = manager.run(graph)
    assert [s.call.definition.name for s in manager.history] == [
        *("dce", "cse", "raise-router", "cse")
    ]
    assert manager.history[0].before is graph and manager.history[-1].after is after
    for earlier, later in zip(manager.history[:-1], manager.history[1:], strict=True):
        assert earlier.after is later.before
    assert all(s.seconds >= 0 and s.changed == (s.rewrites > 0) for s in manager.history)


class Watcher:
    """Notes what happens around passes."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def before(self, call: PassCall, graph: Graph, index: int) -> None:
        self.seen.append(("before", str(call), index))

    def after(self, step: Step, index: int) -> None:
        self.seen.append(("after", str(step.call), index))


def test_observers_stand_around_each_pass() -> None:
    watcher = Watcher()
    PassManager([PassCall(find_pass("cse")), PassCall(find_pass("dce"))], [watcher]).run(
        parse(CHAIN)
    )
    assert watcher.seen == [
        *(("before", "cse", 0), ("after", "cse", 0)),
        *(("before", "dce", 1), ("after", "dce", 1)),
    ]


def test_errors_name_the_pass() -> None:
    def broken(graph: Graph) -> Graph:
        raise IRError("no good")

    call = PassCall(PassDef("broken", broken, frozenset()))
    with pytest.raises(IRError, match="pass broken: no good"):
        PassManager([call]).run(parse(CHAIN))


def exchange(graph: Graph) -> Graph:
    """Every t.neg becomes a t.abs and the other way round: four rewrites."""
    other = {"t.neg": "t.abs", "t.abs": "t.neg"}
    return transform(graph, lambda b, op: b(other[op.kind], *op.operands), "exchange")


EXCHANGE = PassCall(PassDef("exchange", exchange, frozenset(("t",))))


@pytest.mark.parametrize("amount", range(7))
def test_fuel_stops_after_exactly_so_many_rewrites(amount: int) -> None:
    graph = parse(CHAIN)
    manager = PassManager([EXCHANGE, EXCHANGE])
    with fuel.limit(amount) as record:
        after = manager.run(graph)
    kinds = [op.kind for op in graph.ops]
    swapped = ["t.abs", "t.neg"] * 2
    done = min(amount, 4)
    again = amount - done
    expected = kinds[:again] + swapped[again:done] + kinds[done:]
    assert [op.kind for op in after.ops] == expected
    assert len(record.spent) == amount and record.left == 0
    assert [s.rewrites for s in manager.history] == [done, again]
    assert (after is graph) == (amount == 0)


def test_without_a_limit_rewrites_are_counted() -> None:
    manager = PassManager([EXCHANGE])
    with fuel.limit(None) as record:
        manager.run(parse(CHAIN))
    assert len(record.spent) == 4 and record.left is None
    assert record.spent[0].startswith("exchange: %a: f32[T] = t.neg")
    assert fuel.current() is None
    assert fuel.spend("anything")


def test_a_rewrite_to_another_type_is_refused() -> None:
    def widen(graph: Graph) -> Graph:
        return transform(graph, lambda b, op: b("t.cast", *op.operands, dtype="f64"), "widen")

    with pytest.raises(PassError, match="would become values of types f64"):
        widen(parse(CHAIN))


def test_rewriting_that_never_settles_is_an_error() -> None:
    with pytest.raises(PassError, match="did not settle within 5 rounds"):
        fixpoint(parse(CHAIN), exchange, "exchange", limit=5)


def test_topological_order_keeps_the_given_order_where_it_can() -> None:
    graph = parse(CHAIN)
    assert topological(graph.ops[::-1], graph.inputs) == graph.ops
    assert topological(graph.ops, graph.inputs) == graph.ops
