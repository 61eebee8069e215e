"""Running emitted modules and comparing them with the interpreter of the IR."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from moec import interp
from moec.capture.block import MAX_TOKENS
from moec.ir import Graph
from moec.ir.types import DTYPES
from moec.manager import PassManager
from moec.pipeline import pipeline
from moec.runtime.artifact import Artifact, build
from tests.graphs import Block

SMALL = "block-m=16,block-n=16,block-k=16,block=32"
SMALL_TMA = "descriptors=true,block-m=16,block-n=32,block-k=16,block=32"


def lowered(
    graph: Graph, options: str = SMALL, *, training: bool = True, high: int = MAX_TOKENS
) -> Graph:
    """A graph after the whole pipeline, with small tiles; in the range that models come with."""
    graph = replace(graph, ranges={n: (low, high) for n, (low, _) in graph.ranges.items()})
    return PassManager(f"{pipeline('triton', training)}, lower{{{options}}}").run(graph)


def built(graph: Graph, folder: Path) -> Artifact:
    """The module emitted for a lowered graph."""
    return build(graph, "triton", "training", (), folder)


def run(compiled: Artifact, arguments: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Outputs, then the gradients that exist; the arguments end with the cotangents."""
    count = len(compiled.graph.inputs)
    data, cotangents = arguments[:count], arguments[count:]
    outputs, saved = compiled.forward(*data)
    if compiled.backward is None:
        return list(outputs)
    kept = [data[i] for i in compiled.backward_inputs]
    gradients = compiled.backward([*kept, *saved, *cotangents])
    return [*outputs, *(g for g in gradients if g is not None)]


def cotangents(graph: Graph, tokens: int, seed: int = 1) -> list[torch.Tensor]:
    """Random gradients of the outputs."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [
        [tokens if not isinstance(d, int) else d for d in v.type.shape] for v in graph.cotangents
    ]
    return [
        torch.randn(shape, generator=generator).to(DTYPES[v.type.dtype])
        for shape, v in zip(shapes, graph.cotangents, strict=True)
    ]


def error(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    """The relative error in norm; NaN counts as infinite."""
    if actual.numel() == 0:
        return 0.0
    scale = float(wanted.double().norm()) or 1.0
    distance = float((actual.double() - wanted.double()).norm()) / scale
    return distance if distance == distance else float("inf")


def send_all_to_one(block: Block, data: Sequence[torch.Tensor]) -> None:
    """Change the router so that all tokens choose the same experts, whatever they are."""
    hints = [v.hint for v in block.graph.inputs]
    data[hints.index("x")][:, 0] = 1.0
    router = data[hints.index("router")]
    router[:, 0] = 0.0
    router[: block.options.choices, 0] = 40.0


def arguments(block: Block, graph: Graph, tokens: int, routing: str) -> list[torch.Tensor]:
    """Inputs and cotangents for which rounding does not change the routing."""
    for seed in range(20):
        found = [*block.arguments(tokens, routing, seed), *cotangents(graph, tokens)]
        if block.options.activation == "gpt_oss":  # no number at the edge of a clamp
            found[0] *= 0.25
        if routing == "one":
            send_all_to_one(block, found)
        exact = interp.run(graph, found, float64=True)
        rounded = interp.run(graph, found)
        if error(rounded[0], exact[0]) < 0.05:
            return found
    raise AssertionError("no seed whose routing survives rounding")


def check(block: Block, graph: Graph, compiled: Artifact, tokens: int, routing: str) -> None:
    """Compare a module with float64: tightly in float32, else with what rounding does."""
    data = arguments(block, graph, tokens, routing)
    exact = interp.run(graph, data, float64=True)
    rounded = interp.run(graph, data)
    tight = {"f32": 1e-5, "f64": 1e-12}.get(block.options.dtype)
    for i, (actual, e, r) in enumerate(zip(run(compiled, data), exact, rounded, strict=True)):
        assert actual.shape == e.shape and actual.dtype == r.dtype, i
        limit = tight if tight is not None else 4e-3 + 1.5 * error(r, e)
        assert error(actual, e) <= max(limit, 3 * error(r, e) if tight else 0), (i, error(r, e))
