"""Finding the MoE regions of a model: by structure, then by reading their code."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from moec.capture.arguments import Extra
from moec.capture.block import CapturedBlock, capture_block, opaque_experts, weight_hint
from moec.capture.check import SIZES, compare, compare_experts, unchanged
from moec.capture.dense import capture_dense
from moec.capture.dense_blocks import DenseForm, dense_form, scored_experts
from moec.capture.dense_check import compare_dense
from moec.capture.evidence import refuse_without_scores
from moec.capture.experts import ExpertsBody, hidden_sizes, named_weights, read_experts
from moec.capture.flatten import flatten_tokens
from moec.capture.loops import capture_loop, has_expert_list
from moec.errors import CaptureError, MoecError, NotRunError
from moec.ir.builder import Builder
from moec.ir.dims import dim
from moec.ir.graph import Graph, Value
from moec.ir.types import Type, dtype_name
from moec.ir.verify import verify
from moec.manager import PassManager


@dataclass(frozen=True)
class FoundRegion:
    """A region of a model: a MoE block, or the experts inside one whose router could not be read.

    ``graph`` is the imported forward IR (``None`` if the module stays as it is, then ``reason``
    says why); ``weights`` are the parameter paths, relative to the module, of the graph's inputs
    after the data; ``results`` says of each output whether it has the token axes of the input
    ("lead") or is as computed; ``tree`` is the structure of the module's result. ``ran`` says
    whether the module's own code ran when it was tried. ``kind`` is "block" (called with tokens),
    "experts" (tokens, indices, weights) or "loop".
    """

    name: str
    module: nn.Module
    kind: str
    graph: Graph | None
    weights: tuple[str, ...] = ()
    reason: str = ""
    tree: Any = None
    results: tuple[tuple[Any, ...], ...] = ((),)
    ran: bool = True

    @property
    def fingerprint(self) -> str:
        """Equal for regions that can share one compiled artifact."""
        return "" if self.graph is None else self.graph.fingerprint


@dataclass(frozen=True)
class Candidate:
    """A place in the module tree that looks like a region; ``experts`` is the path of the experts
    below it; ``dense`` says how a block without such experts and without a loop is called.
    """

    name: str
    module: nn.Module
    experts: str | None
    dense: DenseForm | None = None

    @property
    def is_experts(self) -> bool:
        """Whether the module itself is called with tokens, indices and weights."""
        return self.experts is None and self.dense is None and is_experts(self.module)


def find_candidates(model: nn.Module) -> Iterator[Candidate]:
    """Modules that look like MoE regions, outermost first, none inside another.

    A block has a child that takes three tensors and holds stacked or listed experts; a loop block
    holds a list of experts itself; a dense block holds weights by expert and what scores them.
    """
    taken: set[nn.Module] = set()
    tried: dict[Hashable, DenseForm | None] = {}
    for name, module in model.named_modules():
        if module in taken:
            continue
        experts = next((n for n, child in module.named_children() if _surely_experts(child)), None)
        known = experts is not None or _surely_experts(module) or _is_loop(module)
        dense = None if known else dense_form(module, tried)
        if known or dense is not None:
            yield Candidate(name, module, experts, dense)
            taken.update(module.modules())


def _surely_experts(module: nn.Module) -> bool:
    """Whether a module has the experts contract, by more than its shape if one stacked weight is
    all it has.

    Tables of position embeddings are of rank 3 too, in modules that take three tensors.
    """
    if not is_experts(module):
        return False
    if sum(p.dim() == 3 for p in module.parameters(recurse=False)) > 1:
        return True
    try:
        read_experts(module)
    except MoecError:
        return False
    return True


def _is_loop(module: nn.Module) -> bool:
    """Whether a module holds a list of experts, and none of its submodules is a region itself."""
    inside = (m for m in module.modules() if m is not module)
    return has_expert_list(module) and not any(is_experts(m) or has_expert_list(m) for m in inside)


def is_experts(module: nn.Module) -> bool:
    """Whether a module has the experts contract: ``forward(x, idx, w)`` and weights of several
    experts.
    """
    if not any(p.dim() == 3 for p in module.parameters(recurse=False)):
        return False
    parameters = list(inspect.signature(inspect.unwrap(type(module).forward)).parameters.values())[
        1:
    ]
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(positional) == 3


def find_regions(model: nn.Module) -> list[FoundRegion]:
    """Every region of a model with its imported IR, or the reason why it stays as it is.

    Structurally equal blocks are captured each; compare ``fingerprint`` to compile each structure
    once.
    """
    return [capture(candidate) for candidate in find_candidates(model)]


def capture(candidate: Candidate, dtype: torch.dtype | None = None, rank: int = 3) -> FoundRegion:
    """Capture one candidate for tokens of ``dtype`` (default: its parameters') and ``rank``.

    Falls back from the whole block to its experts alone; what cannot be read has ``graph=None``.
    """
    if candidate.is_experts:
        return capture_experts(candidate, dtype)
    found = capture_whole(candidate, dtype, rank)
    if found.graph is not None or candidate.experts is None:
        return found
    inner = replace(
        candidate,
        name=join(candidate.name, candidate.experts),
        module=candidate.module.get_submodule(candidate.experts),
    )
    fallback = capture_experts(inner, dtype)
    return replace(fallback, reason=found.reason if fallback.graph is not None else fallback.reason)


def capture_whole(
    candidate: Candidate,
    dtype: torch.dtype | None = None,
    rank: int = 3,
    extras: Sequence[Extra] = (),
) -> FoundRegion:
    """Capture a whole block: experts module and router, a loop over a list of experts, or a block
    without a loop, called with arguments of the forms ``extras`` after the tokens.
    """
    name, module = candidate.name, candidate.module
    kind = "loop" if candidate.experts is None else "block"
    kind = "dense" if candidate.dense is not None else kind
    try:
        with unchanged(module):
            if candidate.dense is None:
                try:
                    captured = _captured(candidate, dtype, rank)
                    return _checked(_finished(name, module, kind, captured), dtype, rank)
                except CaptureError:
                    if candidate.experts is not None:
                        raise
                    return _dense_loop(candidate, dtype, rank)
            return _dense(candidate, dtype, rank, extras)
    except MoecError as error:
        ran = not isinstance(error, NotRunError)
        return FoundRegion(name, module, kind, None, reason=str(error), ran=ran)


def _dense(
    candidate: Candidate, dtype: torch.dtype | None, rank: int, extras: Sequence[Extra]
) -> FoundRegion:
    """A block without a loop that depends on data, compared with its module."""
    _check_call(candidate.module, rank)
    captured = capture_dense(candidate.module, candidate.name, dtype, rank, extras)
    sizes = candidate.dense.scores if candidate.dense else scored_experts(candidate.module)
    refuse_without_scores(captured.graph, 1 + len(extras), sizes)
    found = _finished(candidate.name, candidate.module, "dense", captured)
    if found.graph is not None:
        compare_dense(found.module, found.graph, found.weights, rank, extras, captured.doubtful)
    return found


def _dense_loop(candidate: Candidate, dtype: torch.dtype | None, rank: int) -> FoundRegion:
    """A list of experts that is no loop over choices, as straight-line code if it is that; why it
    is no loop is the better reason if not.
    """
    error = sys.exception()
    try:
        return _dense(candidate, dtype, rank, ())
    except MoecError:
        if error is None:
            raise
        raise error from None


def _check_call(module: nn.Module, rank: int) -> None:
    """Refuse tokens of a rank that no form has, and a forward that is not the class's."""
    if rank not in SIZES:
        ranks = " or ".join(map(str, sorted(SIZES)))
        raise CaptureError(
            f"{type(module).__name__} is called with tokens of rank {rank}, not {ranks}"
        )
    if "forward" in vars(module):
        raise CaptureError(
            f"{type(module).__name__} has a forward of its own instance, put there by a library"
        )


def _captured(candidate: Candidate, dtype: torch.dtype | None, rank: int) -> CapturedBlock:
    name, module = candidate.name, candidate.module
    _check_call(module, rank)
    if candidate.experts is None:
        return capture_loop(module, name, dtype, rank)
    body = read_experts(module.get_submodule(candidate.experts), join(name, candidate.experts))
    experts = module.get_submodule(candidate.experts)
    sizes = dict.fromkeys([body.hidden, *hidden_sizes(module)])
    examples = [_example(module, hidden, dtype, rank) for hidden in sizes]
    with opaque_experts(experts):
        example = next((x for x in examples if _runs(module, x)), None)
    if example is None:
        raise NotRunError(
            f"{type(module).__name__} did not run on tokens of shape "
            f"{tuple(examples[0].shape)} alone"
        )
    return capture_block(module, body, candidate.experts, example, name)


def _runs(module: nn.Module, x: torch.Tensor) -> bool:
    """Whether a block takes tokens of this width; that of its experts may be another."""
    try:
        with torch.no_grad():
            module(x)
    except Exception:  # what a user's code raises on wrong sizes is up to that code
        return False
    return True


def _checked(found: FoundRegion, dtype: torch.dtype | None, rank: int) -> FoundRegion:
    """The region, if it computes what its module computes."""
    if found.graph is not None:
        parameter = next(found.module.parameters())
        hidden = int(found.graph.inputs[0].type.shape[-1])
        compare(found.module, found.graph, found.weights, hidden, dtype or parameter.dtype, rank)
    return found


def capture_experts(
    candidate: Candidate,
    dtype: torch.dtype | None = None,
    choices: int = 2,
    weight_dtype: torch.dtype = torch.float32,
) -> FoundRegion:
    """Capture an experts module alone: inputs are tokens ``[T, H]``, indices and weights ``[T,
    K]``.
    """
    name, module = candidate.name, candidate.module
    try:
        with unchanged(module):
            body = read_experts(module, name)
            token_dtype = None if dtype is None else dtype_name(dtype)
            graph, weights = experts_graph(
                module, body, choices, dtype_name(weight_dtype), token_dtype
            )
            compare_experts(module, graph, weights, body.experts)
    except MoecError as error:
        return FoundRegion(name, module, "experts", None, reason=str(error))
    return FoundRegion(name, module, "experts", graph, weights)


def join(*parts: str) -> str:
    """A module path from its parts."""
    return ".".join(p for p in parts if p)


def _example(module: nn.Module, hidden: int, dtype: torch.dtype | None, rank: int) -> torch.Tensor:
    parameter = next(module.parameters())
    leading = (3, 5) if rank == 3 else (15,)
    return torch.randn(*leading, hidden, device=parameter.device, dtype=torch.float32).to(
        dtype or parameter.dtype
    )


def _finished(name: str, module: nn.Module, kind: str, captured: CapturedBlock) -> FoundRegion:
    graph = PassManager("simplify, cse, dce").run(captured.graph)
    lead = tuple(captured.graph.inputs[0].type.shape[:-1])
    results = tuple(("lead",) if v.type.shape[: len(lead)] == lead else () for v in graph.outputs)
    flat = flatten_tokens(graph) if "S" in graph.ranges else None
    graph = graph if flat is None else PassManager("simplify, cse, dce").run(flat)
    return FoundRegion(
        name, module, kind, verify(graph), captured.weights, tree=captured.tree, results=results
    )


def experts_graph(
    experts: nn.Module,
    body: ExpertsBody,
    choices: int = 2,
    weight_dtype: str = "f32",
    dtype: str | None = None,
) -> tuple[Graph, tuple[str, ...]]:
    """The IR of an experts module called with ``[T, H]``, ``[T, K]`` and ``[T, K]``; and its
    weights' paths.
    """
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
            weights[path] = Value(
                Type(dtype_name(tensor.dtype), tuple(tensor.shape)), weight_hint(path)
            )
        return weights[path]

    x, idx, w = data
    result = body.inline(builder, x, idx, w, weight)
    graph = builder.graph(type(experts).__name__, [*data, *weights.values()], [result])
    return verify(PassManager("simplify, cse, dce").run(graph)), tuple(weights)


__all__ = [
    "Candidate",
    "FoundRegion",
    "capture",
    "capture_experts",
    "capture_whole",
    "find_candidates",
    "find_regions",
]
