"""Which artifact and which kernels serve which numbers of tokens, in words."""

from __future__ import annotations

from collections.abc import Iterator

from moec.ir.graph import Graph, walk
from moec.runtime.artifact import Artifact
from moec.runtime.captured import MOST_TOKENS


def artifact_lines(artifact: Artifact) -> Iterator[str]:
    """The file of an artifact; where others serve some numbers of tokens, a line for each range."""
    yield f"{artifact.mode} artifact: {artifact.path}"
    yield from _rounding(artifact.graph)
    few, most = artifact.few, artifact.few_tokens
    made = few.made if few is not None else None
    if artifact.target != "triton":
        if made is not None:
            yield f"{made.mode} artifact: {made.path}"
        return
    first = 0
    if few is not None:
        name = str(made.path) if made is not None else "compiled at the first such call"
        kernels = f"; {_kernels(made.graph)}" if made is not None else ""
        yield f"    0 to {most} tokens: {name}{kernels}"
        first = most + 1
    if artifact.captures is not None:
        yield f"    {first} to {MOST_TOKENS} tokens: the artifact, captured as CUDA graphs"
    yield f"    {first} tokens and more: {_kernels(artifact.graph)}"


def _rounding(graph: Graph) -> Iterator[str]:
    """What changes the routing, if anything does."""
    for op in walk(graph):
        if op.kind == "moe.round_tokens":
            name = op.results[0].hint
            yield f"    token rounding: %{name} fills tiles of {op.attrs['tile']} rows, in training"


def _kernels(graph: Graph) -> str:
    """The templates and tiles of a graph's kernels."""
    found = []
    for op in graph.ops:
        template, tile = op.attrs.get("template"), op.attrs.get("tile")
        if template is None or tile is None:
            continue
        size = " x ".join(map(str, tile[:3]))
        found.append(f"%{op.results[0].hint} by {template}, tile {size}")
    return "; ".join(found) or "PyTorch's own"


__all__ = ["artifact_lines"]
