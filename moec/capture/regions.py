"""Finding the MoE regions of a model: by structure, then by reading their code."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from moec.capture.block import CapturedBlock, capture_block, weight_hint
from moec.capture.experts import ExpertsBody, named_weights, read_experts
from moec.capture.flatten import flatten_tokens
from moec.capture.loops import capture_loop, has_expert_list
from moec.errors import CaptureError, MoecError
from moec.ir.builder import Builder
from moec.ir.dims import dim
from moec.ir.graph import Graph, Value
from moec.ir.types import Type, dtype_name
from moec.ir.verify import verify
from moec.manager import PassManager


@dataclass(frozen=True)
class FoundRegion:
    """A region of a model: a MoE block, or the experts inside one whose router could not be read.

    ``graph`` is the imported forward IR (``None`` if the module stays as it is, then ``reason`` says why);
    ``weights`` are the parameter paths, relative to the module, of the graph's inputs after the data.
    ``kind`` is "block" (called with tokens), "experts" (tokens, indices, weights) or "loop".
    """

    name: str
    module: nn.Module
    kind: str
    graph: Graph | None
    weights: tuple[str, ...] = ()
    reason: str = ""
    tree: Any = None

    @property
    def fingerprint(self) -> str:
        """Equal for regions that can share one compiled artifact."""
        return "" if self.graph is None else self.graph.fingerprint


@dataclass(frozen=True)
class Candidate:
    """A place in the module tree that looks like a region; ``experts`` is the path of the experts below it."""

    name: str
    module: nn.Module
    experts: str | None


def find_candidates(model: nn.Module) -> Iterator[Candidate]:
    """Modules that look like MoE regions, outermost first, none inside another.

    A block has a child that takes three tensors and holds stacked or listed experts; a loop block holds a
    list of experts itself.
    """
    taken: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in taken:
            continue
        experts = next((n for n, child in module.named_children() if is_experts(child)), None)
        if experts is not None or is_experts(module) or has_expert_list(module):
            yield Candidate(name, module, experts)
            taken.update(module.modules())


def is_experts(module: nn.Module) -> bool:
    """Whether a module has the experts contract: ``forward(x, idx, w)`` and weights of several experts."""
    if not any(p.dim() == 3 for p in module.parameters(recurse=False)):
        return False
    parameters = list(inspect.signature(inspect.unwrap(type(module).forward)).parameters.values())[1:]
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(positional) == 3


def find_regions(model: nn.Module) -> list[FoundRegion]:
    """Every region of a model with its imported IR, or the reason why it stays as it is.

    Structurally equal blocks are captured each; compare ``fingerprint`` to compile each structure once.
    """
    return [capture(candidate) for candidate in find_candidates(model)]


def capture(candidate: Candidate, dtype: torch.dtype | None = None, rank: int = 3) -> FoundRegion:
    """Capture one candidate for tokens of ``dtype`` (default: its parameters') and ``rank``.

    Falls back from the whole block to its experts alone; what cannot be read has ``graph=None``.
    """
    name, module = candidate.name, candidate.module
    try:
        if candidate.experts is None and not is_experts(module):
            return _loop(candidate, rank)
        if candidate.experts is None:
            return _experts_region(name, module, "")
    except MoecError as error:
        return FoundRegion(name, module, "loop", None, reason=str(error))
    return _block_region(candidate, dtype, rank)


def _block_region(candidate: Candidate, dtype: torch.dtype | None, rank: int) -> FoundRegion:
    name, module, path = candidate.name, candidate.module, candidate.experts or ""
    experts = module.get_submodule(path)
    full = f"{name}.{path}" if name else path
    try:
        body = read_experts(experts, full)
    except MoecError as error:
        return FoundRegion(name, module, "block", None, reason=str(error))
    try:
        captured = capture_block(module, body, path, _example(module, body.hidden, dtype, rank), name)
        return _finished(name, module, "block", captured)
    except MoecError as error:
        inner = _experts_region(full, experts, str(error))
        return inner


def _example(module: nn.Module, hidden: int, dtype: torch.dtype | None, rank: int) -> torch.Tensor:
    parameter = next(module.parameters())
    leading = (3, 5) if rank == 3 else (15,)
    return torch.randn(*leading, hidden, device=parameter.device, dtype=torch.float32).to(dtype or parameter.dtype)


def _finished(name: str, module: nn.Module, kind: str, captured: CapturedBlock) -> FoundRegion:
    graph = PassManager("simplify, cse, dce").run(captured.graph)
    flat = flatten_tokens(graph) if "S" in graph.ranges else graph
    graph = verify(PassManager("simplify, cse, dce").run(flat)) if flat is not None else verify(graph)
    return FoundRegion(name, module, kind, graph, captured.weights, tree=captured.tree)


def _loop(candidate: Candidate, rank: int) -> FoundRegion:
    captured = capture_loop(candidate.module, candidate.name, rank)
    return _finished(candidate.name, candidate.module, "loop", captured)


def _experts_region(name: str, experts: nn.Module, reason: str) -> FoundRegion:
    """The region of an experts module alone: inputs are tokens, indices and weights."""
    body = read_experts(experts, name)
    return FoundRegion(name, experts, "experts", *experts_graph(experts, body), reason=reason)


def experts_graph(experts: nn.Module, body: ExpertsBody, choices: int = 2, weight_dtype: str = "f32", dtype: str | None = None) -> tuple[Graph, tuple[str, ...]]:
    """The IR of an experts module called with ``[T, H]``, ``[T, K]`` and ``[T, K]``; and its weights' paths."""
    tensors = dict(named_weights(experts))
    builder = Builder({"T": (0, 2**31 - 1)})
    tokens = dim("T")
    dtype = dtype or dtype_name(next(experts.parameters()).dtype)
    data = [
        Value(Type(dtype, (tokens, body.hidden)), "x"),
        Value(Type("i64", (tokens, choices)), "idx"),
        Value(Type(weight_dtype, (tokens, choices)), "w"),
    ]
    weights: dict[str, Value] = {}

    def weight(path: str) -> Value:
        if path not in weights:
            tensor = tensors[path]
            weights[path] = Value(Type(dtype_name(tensor.dtype), tuple(tensor.shape)), weight_hint(path))
        return weights[path]

    result = body.inline(builder, *data, weight)
    graph = builder.graph(type(experts).__name__, [*data, *weights.values()], [result])
    return verify(PassManager("simplify, cse, dce").run(graph)), tuple(weights)


def unread(region: FoundRegion, reason: str) -> FoundRegion:
    """The same region, left as it is for ``reason``."""
    return replace(region, graph=None, reason=reason)


__all__ = ["Candidate", "CaptureError", "FoundRegion", "capture", "experts_graph", "find_candidates", "find_regions"]
