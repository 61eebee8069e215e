"""Capturing one region: by the way that its form asks for, compared with its module before use."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from moec.capture.arguments import Extra
from moec.capture.block import CapturedBlock, capture_block, opaque_experts, weight_hint
from moec.capture.check import (
    SIZES,
    compare,
    compare_experts,
    constant_writes,
    ranks_taken,
    unchanged,
)
from moec.capture.check_gradients import compare_gradients
from moec.capture.counts import hidden_sizes
from moec.capture.dense import capture_dense
from moec.capture.dense_blocks import scored_experts
from moec.capture.dense_check import compare_dense
from moec.capture.disagreement import refuse_split_devices
from moec.capture.evidence import refuse_without_scores
from moec.capture.experts import ExpertsBody, named_weights
from moec.capture.flatten import flatten_tokens
from moec.capture.found import Candidate, FoundRegion, join
from moec.capture.lists import has_expert_list
from moec.capture.loops import capture_loop
from moec.capture.reading import ExpertGroups, read_experts
from moec.capture.trial import Trial
from moec.capture.writes import Write
from moec.errors import CaptureError, MoecError, NotRunError
from moec.ir.builder import Builder
from moec.ir.dims import dim
from moec.ir.graph import Graph, Value
from moec.ir.types import Type, dtype_name
from moec.ir.verify import verify
from moec.manager import PassManager
from moec.result_form import ResultForm


def capture_whole(
    candidate: Candidate,
    dtype: torch.dtype | None = None,
    rank: int = 3,
    trial: Trial = Trial(),  # noqa: B008 (immutable)
    extras: Sequence[Extra] = (),
) -> FoundRegion:
    """Capture a whole block: experts module and router, a loop over a list of experts, or a block
    without a loop.

    ``trial`` says what it is called with besides tokens; ``extras`` are arguments after the tokens
    of a block without a loop, which name experts.
    """
    name, module = candidate.name, candidate.module
    kind = "loop" if candidate.experts is None else "block"
    kind = "dense" if candidate.dense is not None else kind
    try:
        refuse_split_devices(module)
        if candidate.dense is None:
            return _loop_or_block(candidate, kind, dtype, rank, trial)
        with unchanged(module):
            return _dense(candidate, dtype, rank, trial, extras)
    except MoecError as error:
        ran = not isinstance(error, NotRunError)
        return FoundRegion(name, module, kind, None, reason=str(error), ran=ran)
    except Exception as error:  # a fault in reading a model must not stop that model
        return FoundRegion(name, module, kind, None, reason=_unread(module, error))


def _loop_or_block(
    candidate: Candidate, kind: str, dtype: torch.dtype | None, rank: int, trial: Trial
) -> FoundRegion:
    name, module = candidate.name, candidate.module
    try:
        with unchanged(module, plain=True) as writes:
            captured = _captured(candidate, dtype, rank, trial)
            finished = _finished(name, module, kind, captured, trial)
            found = _checked(finished, dtype, rank, trial, captured.doubtful)
        return _with_writes(found, writes, dtype, rank, trial)
    except CaptureError:
        if candidate.experts is not None:
            raise
        with unchanged(module):
            return _dense_loop(candidate, dtype, rank, trial)


def _with_writes(
    found: FoundRegion,
    writes: Sequence[Write],
    dtype: torch.dtype | None,
    rank: int,
    trial: Trial,
) -> FoundRegion:
    """The region with what a call leaves on its modules."""
    if found.graph is None or not writes:
        return found
    hidden = int(found.graph.inputs[0].type.shape[-1])
    dtype = dtype or next(found.module.parameters()).dtype
    constant = constant_writes(found.module, writes, hidden, dtype, rank, trial)
    return replace(found, writes=constant)


def _dense(
    candidate: Candidate,
    dtype: torch.dtype | None,
    rank: int,
    trial: Trial,
    extras: Sequence[Extra] = (),
) -> FoundRegion:
    """A block without a loop that depends on data, compared with its module."""
    name, module = candidate.name, candidate.module
    _check_call(module, rank)
    if not trial.form.is_tokens_alone:
        raise CaptureError(f"{type(module).__name__} is called with more than tokens")
    captured = capture_dense(module, name, dtype, rank, extras)
    sizes = candidate.dense.scores if candidate.dense else scored_experts(module)
    refuse_without_scores(captured.graph, 1 + len(extras), sizes)
    found = _finished(name, module, "dense", captured, trial)
    if found.graph is not None:
        compare_dense(module, found.graph, found.weights, rank, extras, captured.doubtful)
        if not extras and not next(module.parameters()).is_meta:
            hidden = int(found.graph.inputs[0].type.shape[-1])
            x = _example(module, hidden, dtype, rank)
            compare_gradients(module, found.graph, found.weights, [x], trial.form)
    return found


def _dense_loop(
    candidate: Candidate, dtype: torch.dtype | None, rank: int, trial: Trial
) -> FoundRegion:
    """Experts that are no loop over choices, as straight-line code if they are that; why they are
    no loop is the better reason if not, where they are in a list.
    """
    error = sys.exception()
    try:
        return _dense(candidate, dtype, rank, trial)
    except MoecError:
        if error is None or not has_expert_list(candidate.module):
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


def _captured(
    candidate: Candidate, dtype: torch.dtype | None, rank: int, trial: Trial
) -> CapturedBlock:
    name, module = candidate.name, candidate.module
    _check_call(module, rank)
    if candidate.experts is None:
        if not trial.form.is_tokens_alone:
            raise CaptureError(
                f"{type(module).__name__} has a loop over a list of experts and is called with "
                "more than tokens"
            )
        return capture_loop(module, name, dtype, rank)
    body = read_experts(module.get_submodule(candidate.experts), join(name, candidate.experts))
    experts = module.get_submodule(candidate.experts)
    sizes = dict.fromkeys([body.hidden, *hidden_sizes(module)])
    generator = torch.Generator().manual_seed(0)
    tokens = [_example(module, hidden, dtype, rank) for hidden in sizes]
    examples = [trial.data(x, generator) for x in tokens]
    with opaque_experts(experts):
        example = next((data for data in examples if _runs(module, trial, data)), None)
    if example is None:
        raise NotRunError(_did_not_run(module, tokens[0], trial))
    return capture_block(module, body, candidate.experts, example, trial.form, name)


def _did_not_run(module: nn.Module, tokens: torch.Tensor, trial: Trial) -> str:
    said = f"{type(module).__name__} did not run on tokens of shape {tuple(tokens.shape)}"
    if not trial.form.is_tokens_alone:
        return f"{said} with the other arguments of its call"
    return f"{said} alone; a call with more arguments is captured when it first comes"


def _runs(module: nn.Module, trial: Trial, data: list[torch.Tensor]) -> bool:
    """Whether a block takes tokens of this width; that of its experts may be another."""
    try:
        with torch.no_grad():
            trial.form.call(module, data)
    except Exception:  # what a user's code raises on wrong sizes is up to that code
        return False
    return True


def _checked(
    found: FoundRegion,
    dtype: torch.dtype | None,
    rank: int,
    trial: Trial,
    doubtful: Sequence[tuple[int, ...]],
) -> FoundRegion:
    """The region, if it computes what its module computes."""
    if found.graph is not None:
        parameter = next(found.module.parameters())
        hidden = int(found.graph.inputs[0].type.shape[-1])
        wanted = dtype or parameter.dtype
        compare(found.module, found.graph, found.weights, hidden, wanted, rank, trial, doubtful)
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
        refuse_split_devices(module)
        with unchanged(module):
            body = read_experts(module, name)
            token_dtype = None if dtype is None else dtype_name(dtype)
            graph, weights = experts_graph(
                module, body, choices, dtype_name(weight_dtype), token_dtype
            )
            compare_experts(module, graph, weights, body.experts, body.form)
            ranks = ranks_taken(module, graph, body.experts, body.form)
    except MoecError as error:
        return FoundRegion(name, module, "experts", None, reason=str(error))
    except Exception as error:  # a fault in reading a model must not stop that model
        return FoundRegion(name, module, "experts", None, reason=_unread(module, error))
    result = ResultForm(axes=(1,))
    return FoundRegion(name, module, "experts", graph, weights, result=result, ranks=ranks)


def _unread(module: nn.Module, error: Exception) -> str:
    first = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(module).__name__} could not be read ({type(error).__name__}: {first})"


def _example(module: nn.Module, hidden: int, dtype: torch.dtype | None, rank: int) -> torch.Tensor:
    parameter = next(module.parameters())
    leading = (3, 5) if rank == 3 else (15,)
    return torch.randn(*leading, hidden, device=parameter.device, dtype=torch.float32).to(
        dtype or parameter.dtype
    )


def _finished(
    name: str, module: nn.Module, kind: str, captured: CapturedBlock, trial: Trial
) -> FoundRegion:
    graph = PassManager("simplify, cse, dce").run(captured.graph)
    lead = tuple(captured.graph.inputs[0].type.shape[:-1])
    axes = tuple(
        v.type.rank - len(lead) if v.type.shape[: len(lead)] == lead else None
        for v in graph.outputs
    )
    result = ResultForm(captured.tree, captured.constants, axes)
    flat = flatten_tokens(graph) if "S" in graph.ranges else None
    graph = graph if flat is None else PassManager("simplify, cse, dce").run(flat)
    return FoundRegion(
        name, module, kind, verify(graph), captured.weights, result=result, form=trial.form
    )


def experts_graph(
    experts: nn.Module,
    body: ExpertsBody | ExpertGroups,
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
    routing, weighting = body.form.shapes(tokens, choices, body.experts)
    data = [
        Value(Type(dtype, (tokens, body.hidden)), "x"),
        Value(Type("i64", routing), "idx"),
        Value(Type(weight_dtype, weighting), "w"),
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


__all__ = ["capture_experts", "capture_whole", "experts_graph"]
