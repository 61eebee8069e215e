"""No index of an emitted kernel overflows, at any size that the emitted checks let through."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import z3

from benchmarks.emitted_check import SHAPES, Shape, block_graph
from moec.capture.block import MAX_TOKENS
from moec.codegen.module import emit_module
from moec.codegen.triton import source
from moec.codegen.triton.routing import most_few_tokens
from moec.fuzz.blocks import Options
from moec.ir import Builder, Graph, Type, Value, dim, parse
from moec.ir.dims import ceildiv
from moec.manager import PassManager
from moec.pipeline import pipeline
from moec.runtime.launch import row_tile_bound
from tests.graphs import MODELS, OLMOE, build, random_block
from tests.widths_host import Host

TEMPLATES = {"pointer": (False, False), "tma": (True, False), "gluon": (True, True)}
BLOCKS = {
    "olmoe": SHAPES["olmoe"],
    "mixtral": SHAPES["mixtral-8x7b"],
    "many": Shape(1024, 512, 1024, 16),  # experts: T*E passes 2^31 early
    "large": Shape(8192, 8192, 64, 8),  # E*D*I is beyond 2^31
    "odd": Shape(1000, 264, 60, 6),
}
WIDE = 10**7  # tokens for which rows times columns pass 2^31, far from any edge


def emitted(
    graph: Graph, high: int | None, template: str, training: bool = True, repro: bool = False
) -> tuple[str, Graph]:
    """The module of a block whose tokens are declared to be no more than ``high``."""
    descriptors, gluon = TEMPLATES[template]
    ranged = replace(graph, ranges={"T": (0, high)})
    text = pipeline("triton", training, descriptors, gluon=gluon, repro=repro)
    lowered = PassManager(text).run(ranged)
    return emit_module(lowered, "triton"), lowered


@pytest.mark.parametrize("high", [MAX_TOKENS, None, WIDE, 5000])
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", BLOCKS)
def test_nothing_overflows(name: str, template: str, high: int | None) -> None:
    text, graph = emitted(block_graph(BLOCKS[name]), high, template)
    host = Host(text, graph).run()
    assert not host.faults, "\n".join(map(str, host.faults))
    assert host.kernels.peaks, "no number of 32 bits was looked at"
    most = host.sizes["T"].span.high
    assert min(high or MAX_TOKENS, 2**22) <= most <= (high or MAX_TOKENS)


@pytest.mark.parametrize("template", ["pointer", "tma"])
@pytest.mark.parametrize("name", MODELS)
def test_nothing_overflows_with_biases_groups_and_shared_experts(name: str, template: str) -> None:
    options = replace(MODELS[name], hidden=2880, inner=2880, experts=32, choices=4, dtype="bf16")
    text, graph = emitted(build(options).graph, MAX_TOKENS, template)
    host = Host(text, graph).run()
    assert not host.faults, "\n".join(map(str, host.faults))


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss"])
def test_nothing_overflows_where_all_products_are_grouped(name: str, template: str) -> None:
    options = replace(MODELS[name], hidden=2048, inner=1024, experts=64, choices=4, dtype="bf16")
    text, graph = emitted(build(options).graph, MAX_TOKENS, template, repro=True)
    assert ("sum_rows" in text) == (name == "gpt_oss")
    host = Host(text, graph).run()
    assert not host.faults, "\n".join(map(str, host.faults))


@pytest.mark.parametrize(
    "changes",
    [{"mode": "margin"}, {"mode": "threshold", "capacity": 0.5}, {"capacity": 1.25}],
    ids=str,
)
def test_nothing_overflows_where_pairs_have_no_expert(changes: dict[str, Any]) -> None:
    options = Options(hidden=2048, inner=1024, experts=64, choices=8, dtype="bf16", **changes)
    text, graph = emitted(build(options).graph, MAX_TOKENS, "tma")
    host = Host(text, graph).run()
    assert not host.faults, "\n".join(map(str, host.faults))


@pytest.mark.parametrize("seed", range(16))
def test_nothing_overflows_in_random_blocks(seed: int) -> None:
    for high, template, training in ((MAX_TOKENS, "pointer", True), (20_000, "tma", False)):
        text, graph = emitted(random_block(seed).graph, high, template, training)
        host = Host(text, graph).run()
        assert not host.faults, "\n".join(map(str, host.faults))


def expert_choice(experts: int) -> Graph:
    """A block whose experts pick a quarter of the tokens each."""
    tokens, b = dim("T"), Builder()
    x = Value(Type("bf16", (tokens, 256)), "x")
    picks = Value(Type("i32", (experts, ceildiv(tokens, 4))), "picks")
    w = Value(Type("bf16", (experts, 256, 256)), "w")
    perm, offsets, inverse = b("moe.dispatch_picks", picks, tokens=tokens, hint=("p", "o", "i"))
    rows = b("moe.gather", x, perm, inverse, hint="rows")
    made = b("moe.grouped_mm", rows, w, offsets, hint="made")
    y = b("moe.combine", made, perm, inverse, dtype="bf16", hint="y")
    return b.graph("picked", [x, picks, w], [y])


@pytest.mark.parametrize("template", TEMPLATES)
def test_nothing_overflows_where_experts_choose(template: str) -> None:
    text, graph = emitted(expert_choice(128), MAX_TOKENS, template)
    host = Host(text, graph).run()
    assert not host.faults, "\n".join(map(str, host.faults))
    assert 128 * host.sizes["T"].span.high < 2**31
    assert Host(re.sub(r"guards\.at_most\(.*", "", text), graph).run().faults


@pytest.mark.parametrize("name", BLOCKS)
def test_kernels_for_few_tokens_refuse_more(name: str) -> None:
    """All of their indices have 32 bits, whatever range the block is declared for."""
    graph = replace(block_graph(BLOCKS[name]), ranges={"T": (0, MAX_TOKENS)})
    lowered = PassManager(pipeline("triton", False) + ", lower{few=true}").run(graph)
    text = emit_module(lowered, "triton")
    host = Host(text, lowered).run()
    assert not host.faults, "\n".join(map(str, host.faults))
    assert host.sizes["T"].span.high == most_few_tokens(lowered) <= 64
    assert Host(re.sub(r"guards\.at_most\(.*", "", text), lowered).run().faults


def without(text: str, pattern: str) -> Iterator[tuple[str, str, str]]:
    """Function and line of each place that matches, and the text without it."""
    for found in re.finditer(pattern, text):
        line = text[: found.end()].rsplit("\n", 1)[1] + text[found.end() :].split("\n", 1)[0]
        function = re.findall(r"\ndef (\w+)\(", text[: found.start()])[-1]
        yield function, line, text[: found.start()] + text[found.end() :]


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_cast_and_every_check_is_missed(template: str) -> None:
    """Each fault planted is found: so each cast is needed, and no forgotten one would pass."""
    text, graph = emitted(block_graph(SHAPES["qwen3-30b"]), MAX_TOKENS, template)
    planted = [*without(text, r"\.to\((tl|gl)\.int64\)"), *without(text, r"guards\.at_most\(8.*")]
    assert len(planted) >= 10
    for function, line, faulty in planted:
        assert Host(faulty, graph, function=function).run().faults, f"{function}: {line}"


def test_other_faults_are_found() -> None:
    text, graph = emitted(block_graph(SHAPES["olmoe"]), WIDE, "tma")
    planted = [
        (f"guards.at_most(T, {WIDE},", f"guards.at_most(T, {MAX_TOKENS},"),
        ("size = tl.maximum(tl.minimum(tiles_m - first, GROUP), 1)", "size = tiles_m - first"),
        ("row = tl.load(row_tiles + 2 * m + 3)", "row = tl.load(row_tiles + 2 * m + 3) * 64"),
        ("    last += tl.num_programs(0)", "    last += m * 1024"),
        ("before = carry + tl.cumsum(count, 0)", "before = 64 * carry + tl.cumsum(count, 0)"),
    ]
    assert not Host(text, graph).run().faults
    for good, bad in planted:
        assert good in text, good
        assert Host(text.replace(good, bad), graph).run().faults, bad


def test_grids_are_checked() -> None:
    x = "graph @g(%x: f32[T, 65536]) where 0 <= T <= {} {{\n"
    body = "  %y = t.exp(%x) : f32[T, 65536]\n  %z = t.neg(%y) : f32[T, 65536]\n  return %z\n}"
    graph = parse(x.format(MAX_TOKENS) + body)
    lowered = PassManager(pipeline("triton", False)).run(graph)
    text = emit_module(lowered, "triton")
    host = Host(text, lowered).run()
    assert not host.faults and host.sizes["T"].span.high == MAX_TOKENS // 64
    unchecked = re.sub(r"guards\.at_most\(.*", "", text)
    (fault,) = Host(unchecked, lowered).run().faults
    assert "programs along axis 0" in str(fault)


def test_narrow_ranges_need_no_wide_index() -> None:
    for template in TEMPLATES:
        text, _ = emitted(block_graph(SHAPES["s1.4b-n256"]), 4096, template)
        kernels = text.split("import torch", 1)[1].split("SAVED =")[0]
        generated = [f for f in ast.parse(kernels).body if isinstance(f, ast.FunctionDef)]
        library = source.names()
        for function in (f for f in generated if f.name not in library):
            assert "int64" not in ast.unparse(function), function.name


def pick_tile(work: int, tiles_m: int, tiles_n: int, group: int) -> tuple[int, int]:
    """The library's function, in Python."""
    width = group * tiles_n
    first = work // width * group
    size = max(min(tiles_m - first, group), 1)
    return first + work % width % size, work % width // size


def test_every_tile_is_picked_once() -> None:
    """And past the last piece of work, the row tile is no further ahead than the work."""
    text = next(t for t in source.texts({"pick_tile"}))
    assert "size = tl.maximum(tl.minimum(tiles_m - first, GROUP), 1)" in text
    for m, n, group in itertools.product(range(1, 12), range(1, 8), (1, 3, 8)):
        found = {pick_tile(work, m, n, group) for work in range(m * n)}
        assert found == set(itertools.product(range(m), range(n)))
        for work in range(m * n + 3 * group * n):
            assert 0 <= pick_tile(work, m, n, group)[0] <= work // n + group


@pytest.mark.parametrize("tiles_n", [1, 3, 16, 112])
def test_tiles_are_in_range_however_many_there_are(tiles_n: int) -> None:
    """For any number of row tiles that 32 bits hold; the group's size is one of eight cases."""
    work, tiles_m, group = z3.Int("work"), z3.Int("tiles_m"), 8
    width = group * tiles_n
    for size in range(1, group + 1):
        first = work / width * group
        solver = z3.Solver()
        solver.add(tiles_m >= 0, tiles_m < 2**31, work >= 0, work < 2**31)
        rest = tiles_m - first
        solver.add(z3.If(rest < 1, 1, z3.If(rest > group, group, rest)) == size)
        m, n = first + work % width % size, work % width / size
        inside = z3.And(0 <= m, m < tiles_m, 0 <= n, n < tiles_n)
        ahead = z3.And(0 <= m, m <= work / tiles_n + group)
        solver.add(z3.Not(z3.If(work < tiles_m * tiles_n, inside, ahead)))
        assert solver.check() == z3.unsat, solver.model()


def test_stages_of_all_experts_are_no_more_than_the_row_tiles() -> None:
    """What the analysis takes as proved: rows of each expert in steps, added up."""
    for experts, block in itertools.product((1, 2, 3), (1, 2, 4)):
        for sizes in itertools.product(range(7), repeat=experts):
            steps = sum(-(-size // block) for size in sizes)
            assert steps <= row_tile_bound(sum(sizes), experts, block)


def test_emitted_facts_are_those_of_the_sizes() -> None:
    text, _ = emitted(build(replace(OLMOE, hidden=512, inner=256)).graph, WIDE, "pointer")
    assert "# 64-bit: " in text and "# no mask: " in text
    assert f"rows in 32 bits: 2*T <= 2^30 - 2^16 where T <= {WIDE}" in text
