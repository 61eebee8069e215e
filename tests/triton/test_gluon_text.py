"""Which products become kernels in Gluon, and how those read; they cannot be interpreted."""

from __future__ import annotations

import ast

import pytest

from benchmarks.emitted_check import SHAPES, Shape, block_graph
from moec.codegen.module import emit_module
from moec.ir import Graph, parse, show
from moec.manager import PassManager
from moec.pipeline import pipeline


def lowered(shape: Shape, *, training: bool = True, gluon: bool = True) -> Graph:
    text = pipeline("triton", training, True, gluon=gluon)
    return PassManager(text).run(block_graph(shape))


def templates(graph: Graph) -> list[str]:
    """Of the products, in order."""
    return [str(op.attrs["template"]) for op in graph.ops if "template" in op.attrs]


@pytest.mark.parametrize(
    "name, training, expected",
    [
        ("s7b-n256", True, ["gluon"] * 6),
        ("s30b-n512", True, ["gluon"] * 6),
        ("s30b-n1024", True, [*["gluon"] * 4, "tma", "gluon"]),  # large matrices, rows as they are
        ("qwen3-30b", False, ["gluon"] * 2),
        ("olmoe", False, ["tma", "gluon"]),  # many tiles that would gather, and nothing kept
        ("mixtral-8x7b", True, ["tma"] * 6),
    ],
)
def test_sizes_choose_the_template(name: str, training: bool, expected: list[str]) -> None:
    graph = lowered(SHAPES[name], training=training)
    assert templates(graph) == expected
    assert show(parse(show(graph))) == show(graph)
    assert "gluon" not in templates(lowered(SHAPES[name], training=training, gluon=False))


def test_narrow_and_odd_sizes_keep_the_other_templates() -> None:
    assert templates(lowered(Shape(256, 64, 8, 2)))[0] == "tma"
    assert "gluon" not in templates(lowered(Shape(264, 264, 8, 2)))[:2]


def test_modules_read_well() -> None:
    graph = lowered(SHAPES["s7b-n256"])
    text = emit_module(graph, "triton")
    assert text == emit_module(graph, "triton")
    kernels = text.split("import torch", 1)[1].split("SAVED =")[0]
    assert max(len(line) for line in kernels.split("\n") if "%" not in line) <= 100
    functions = [n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef)]
    for kernel in [f for f in functions if f.decorator_list]:
        assert ast.get_docstring(kernel)
        names = {n.id for n in ast.walk(kernel) if isinstance(n, ast.Name)}
        assert not {a.arg for a in kernel.args.args} - names - {"BM", "BN", "BK", "BC"}, kernel.name


def launches(text: str) -> list[str]:
    """The calls of kernels, in order."""
    calls = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call)]
    found = [n for n in calls if isinstance(n.func, ast.Subscript)]
    return [ast.unparse(n) for n in sorted(found, key=lambda n: n.lineno)]


@pytest.mark.parametrize("gluon, descriptors", [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize("name", ["s7b-n256", "s30b-n1024"])
def test_a_profiler_sees_the_same_launches(name: str, gluon: bool, descriptors: bool) -> None:
    text = pipeline("triton", True, descriptors, gluon=gluon)
    graph = PassManager(text).run(block_graph(SHAPES[name]))
    plain = launches(emit_module(graph, "triton"))
    assert len(plain) >= 10
    assert launches(emit_module(graph, "triton", ranges=True)) == plain
