"""What the analysis of widths says of kernels holds of every number that they compute."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from moec.codegen.module import emit_module
from moec.ir import Graph
from tests.graphs import DEEPSEEK_V3, GPT_OSS, OLMOE, Options, build
from tests.widths import Span
from tests.widths_host import Host

from .emitted import SMALL, SMALL_TMA, arguments, built, lowered, run

WHOLE = {numpy.add, numpy.subtract, numpy.multiply}
BLOCKS = {"olmoe": OLMOE, "deepseek_v3": DEEPSEEK_V3, "gpt_oss": GPT_OSS}
MOST = 6  # tokens, whose rows take several tiles


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Span]]:
    """Each kernel's least and greatest number of 32 bits, as its programs run."""
    found: dict[str, Span] = {}
    running = [""]
    run, operate = interpreter.GridExecutor.__call__, interpreter.InterpreterBuilder.binary_op

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        running[0] = self.fn.__name__
        run(self, *args, **kwargs)

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        result = operate(self, lhs, rhs, op)
        if op in WHOLE and result.dtype.scalar == tl.int32 and result.data.size:
            span = Span(int(result.data.min()), int(result.data.max()))
            found[running[0]] = found.get(running[0], span).join(span)
        return result

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", call)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "binary_op", binary_op)
    yield found


def ranged(options: Options, high: int, template: str) -> Graph:
    """A block of few tokens at a time, whose declared range decides the widths of its kernels."""
    small = replace(options, dtype="bf16" if template == SMALL_TMA else "f32")
    graph = build(replace(small, hidden=32, inner=16, experts=4)).graph
    return lowered(graph, template, high=high)


@pytest.mark.parametrize(
    "name, template",
    [("olmoe", SMALL), ("olmoe", SMALL_TMA), ("gpt_oss", SMALL), ("deepseek_v3", SMALL_TMA)],
    ids=["olmoe-pointer", "olmoe-tma", "gpt_oss-pointer", "deepseek_v3-tma"],
)
def test_numbers_are_within_their_bounds(
    name: str, template: str, tmp_path: Path, computed: dict[str, Span]
) -> None:
    """And indices of 32 and of 64 bits give the same."""
    options = replace(BLOCKS[name], experts=4, groups=2 if BLOCKS[name].groups > 1 else 1)
    wide, narrow = (ranged(options, high, template) for high in (2**31 - 1, 4096))
    texts = [emit_module(graph, "triton") for graph in (wide, narrow)]
    assert ["# 64-bit:" in text for text in texts] == [True, False]
    modules = [built(graph, tmp_path) for graph in (wide, narrow)]
    block = build(replace(options, hidden=32, inner=16, dtype=wide.inputs[0].type.dtype))
    for tokens in range(MOST + 1):
        data = arguments(block, wide, tokens, "random" if tokens % 2 else "one")
        results = []
        for graph, text, compiled in zip((wide, narrow), texts, modules, strict=True):
            computed.clear()
            results.append(run(compiled, data))
            bounds = Host(text, graph, high=tokens).run().kernels.peaks
            assert bool(computed) == bool(tokens)
            for kernel, span in computed.items():
                bound = bounds[kernel]
                assert bound.low <= span.low and span.high <= bound.high, (kernel, tokens)
        assert all(map(torch.equal, *results)), tokens
