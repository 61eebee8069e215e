"""CUDA graphs: which blocks may get more rows than asked for; the mode where there is no GPU."""

from typing import Any

import pytest
import torch

import moec
from benchmarks.emitted_check import Shape, block_graph
from moec.errors import CompileError
from moec.ir import Builder, Graph, Type, Value, dim
from moec.ir.dims import ceildiv
from moec.manager import PassManager
from moec.pipeline import pipeline
from moec.runtime.captured import Captures, rows_are_alone
from tests.test_steady import block

T = dim("T")


def one_op(kind: str, **attrs: Any) -> Graph:
    """A graph of one op on ``[T, 4]``."""
    b = Builder({"T": (0, 100)})
    x = Value(Type("f32", (T, 4)), "x")
    made = b(kind, x, **attrs)
    return b.graph("g", [x], [made if isinstance(made, Value) else made[0]])


def test_a_dropless_block_is_of_rows_that_are_alone_before_and_after_fusion() -> None:
    graph = block_graph(Shape(32, 16, 8, 2), "f32")
    assert rows_are_alone(graph)
    assert rows_are_alone(PassManager(pipeline("triton", False, True)).run(graph))


@pytest.mark.parametrize(
    "graph, alone",
    [
        (one_op("t.softmax", dim=-1), True),
        (one_op("t.softmax", dim=0), False),
        (one_op("t.cumsum", dim=0), False),
        (one_op("t.sort", dim=-1), False),  # not among what is known
        (one_op("t.sum", dims=(0,)), False),
        (one_op("t.reshape", shape=(T, 2, 2)), True),
        (one_op("t.reshape", shape=(4 * T,)), False),
        (one_op("t.permute", dims=(1, 0)), False),
    ],
    ids=lambda v: v.ops[0].kind if isinstance(v, Graph) else str(v),
)
def test_ops_along_the_tokens_mix_rows(graph: Graph, alone: bool) -> None:
    assert rows_are_alone(graph) == alone


def test_capacities_mix_rows() -> None:
    b = Builder({"T": (0, 100)})
    idx = Value(Type("i32", (T, 2)), "idx")
    kept = b("moe.limit", idx, experts=4, capacity=ceildiv(T, 2))
    assert not rows_are_alone(b.graph("g", [idx], [kept]))


def test_on_a_cpu_the_mode_changes_nothing() -> None:
    own = block()
    compiled = moec.compile(own, mode="reduce-overhead")
    x = torch.randn(2, 3, 32)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(compiled(x), own(x))
    assert Captures([0], True).call(lambda t: ((t,), ()), [x]) is None


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(CompileError, match="unknown mode 'fast'; modes: 'default', 'reduce-over"):
        moec.compile(block(), mode="fast")
