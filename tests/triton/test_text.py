"""What emitted modules look like, and what the lowering chooses."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

import pytest

from moec.codegen.module import emit_module
from moec.codegen.triton.layout import split_items, wrapped
from moec.ir import Builder, Type, Value, dim, parse, show
from moec.ir.graph import walk
from moec.ir.verify import verify
from tests.graphs import MODELS, Options, build

from .emitted import SMALL, SMALL_TMA, built, lowered, run

WAITS = {"item", "tolist", "cpu", "nonzero", "synchronize", "grouped_mm", "grouped_outer"}
WAITS |= {"group_sum", "dispatch"}  # the library's, which ask for sizes
BLOCKS = {"olmoe": Options(), **MODELS}


@pytest.mark.parametrize("options", [SMALL, SMALL_TMA, ""], ids=["pointer", "tma", "default"])
@pytest.mark.parametrize("name", BLOCKS)
def test_modules_read_well(name: str, options: str) -> None:
    wanted = dataclasses.replace(BLOCKS[name], dtype="bf16", hidden=32, inner=16)
    graph = verify(lowered(build(wanted).graph, options))
    text = emit_module(graph, "triton")
    assert text == emit_module(graph, "triton")
    tree = ast.parse(text)
    called = {
        n.func.attr
        for n in ast.walk(tree)
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)
    }
    assert not called & WAITS, "the host would wait"
    kernels = text.split("import torch", 1)[1].split("SAVED =")[0]
    assert max(len(line) for line in kernels.split("\n") if "%" not in line) <= 100
    for kernel in [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.decorator_list]:
        assert ast.get_docstring(kernel)
        names = {n.id for n in ast.walk(kernel) if isinstance(n, ast.Name)}
        unused = {a.arg for a in kernel.args.args} - names
        assert not unused - {"BM", "BN", "BK", "BC"}, (kernel.name, unused)


def test_every_kernel_gets_its_template_and_tile() -> None:
    graph = lowered(build(Options(dtype="bf16", hidden=32, inner=16)).graph, SMALL_TMA)
    products = [op for op in graph.ops if op.kind in ("kern.grouped_gemm", "kern.grouped_outer")]
    assert products
    for op in products:
        assert op.attrs["template"] == "tma" and op.attrs["tile"][:3] == (16, 32, 16)
    again = parse(show(graph))
    assert show(again) == show(graph)


@pytest.mark.parametrize(
    "options, reason",
    [
        (Options(dtype="f32", hidden=32, inner=16), "dtype"),
        (Options(dtype="bf16", hidden=20, inner=12), "sizes"),
    ],
    ids=["dtype", "sizes"],
)
def test_what_descriptors_cannot_do_uses_pointers(options: Options, reason: str) -> None:
    graph = lowered(build(options).graph, SMALL_TMA)
    templates = {op.attrs.get("template") for op in walk(graph) if "template" in op.attrs}
    assert templates == {"pointer"}, reason


def test_equal_kernels_are_written_once() -> None:
    b, x = Builder(), Value(Type("f32", (dim("T"), 8)), "x")
    y = b("t.linear", b("t.exp", b("t.neg", x)), Value(Type("f32", (8, 8)), "w"), hint="x")
    w = b.ops[-1].operands[1]
    z = b("t.exp", b("t.neg", y))
    graph = lowered(b.graph("twice", [x, w], [z]), "", training=False)
    text = emit_module(graph, "triton")
    assert sum(op.kind == "kern.pointwise" for op in graph.ops) == 2
    assert text.count("@triton.jit") == 1


def test_names_of_kernels_and_values_do_not_meet(tmp_path: Path) -> None:
    b = Builder()
    names = ("moe_scan_counts", "launch", "tl", "scan_counts", "tiles", "device", "torch")
    inputs = [Value(Type("f32", (dim("T"), 8)), n) for n in names]
    total = inputs[0]
    for value in inputs[1:]:
        total = b("t.add", total, b("t.neg", value, hint="tanh"), hint="moe_d_x")
    graph = lowered(b.graph("names", inputs, [total]), "block=32")
    import torch

    data = [torch.randn(5, 8) for _ in range(len(names) + 1)]
    (result, *_) = run(built(graph, tmp_path), data)
    torch.testing.assert_close(result, data[0] - sum(data[1:-1]))


def test_long_lines_break_at_calls() -> None:
    assert split_items("a, f(b, c), [d, e]") == ["a", "f(b, c)", "[d, e]"]
    line = "value = tl.load(pointer + row * 64, mask=inside, other=0.0).to(tl.float32) * (a + b)"
    lines = wrapped(line, 60)
    assert max(map(len, lines)) <= 60
    assert ast.dump(ast.parse("\n".join(lines))) == ast.dump(ast.parse(line))
