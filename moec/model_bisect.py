"""Bisection from a model: is the captured block right, and then what was made of it.

Everything is compared in float64 on one call of the block: the IR that was captured with the
module's own code (results and, for training, gradients), then the IR after each pass with the IR
before it, then the emitted kernels with their bodies.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moec.bisect import StepTest, cotangents, relative_error, same_meaning, same_results
from moec.call_form import graph_inputs, read_call
from moec.capture.reference import own_results
from moec.capture.regions import FoundRegion, find_regions
from moec.compiled import as_original
from moec.errors import CaptureError, CompileError
from moec.execute import on_device_of
from moec.inputs import default_dims, random_inputs
from moec.interp import run
from moec.ir.graph import Graph
from moec.ir.types import DTYPES
from moec.manager import PassCall, Step, parse_pipeline
from moec.pipeline import pipeline
from moec.targets import choose_target, has_descriptors
from moec.verdict import Verdict, judge

# A module in float64 may still compute parts in float32, where its code says so.
_CAPTURE_TOLERANCE = 1e-5
# Tokens of the calls that are made up: more than a tile, and no multiple of one.
TOKENS = 67


@dataclass(frozen=True)
class Block:
    """One distinct block of a model, the paths of all that are equal to it, and a call of it.

    ``data`` are the tensors that the module is called with, ``inputs`` those of its graph.
    """

    found: FoundRegion
    places: tuple[str, ...]
    data: tuple[torch.Tensor, ...]
    inputs: tuple[torch.Tensor, ...]
    is_given: bool

    @property
    def graph(self) -> Graph:
        """The captured graph."""
        if self.found.graph is None:
            raise CaptureError(f"{self.heading} was not captured: {self.found.reason}")
        return self.found.graph

    @property
    def heading(self) -> str:
        """Path, class, and how many are equal."""
        first, others = self.places[0] or "(the model)", len(self.places) - 1
        equal = f" and {others} equal" if others else ""
        return f"{first} ({type(self.found.module).__name__}){equal}"

    def call(self, module: nn.Module, data: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The tensors that the module's own code returns."""
        form = None if self.found.kind == "experts" else self.found.form
        return own_results(module, data, form)


@dataclass(frozen=True)
class BlockVerdict:
    """What is wrong with one block: its capture (``problem``), or what came after it."""

    block: Block
    error: float
    problem: str
    verdict: Verdict | None

    @property
    def is_wrong(self) -> bool:
        """Whether anything is wrong; a block that was not captured runs its own code."""
        return bool(self.problem) or (self.verdict is not None and self.verdict.is_wrong)

    def __str__(self) -> str:
        if self.block.found.graph is None:
            reason = self.block.found.reason
            return f"{self.block.heading}\n  not captured, it runs its own code: {reason}"
        tokens = self.block.data[0].shape[:-1].numel()
        whose = "given" if self.block.is_given else "generated"
        what = f"in float64, on {tokens} {whose} tokens"
        if self.problem:
            return f"{self.block.heading}\n  capture is wrong: {self.problem}, {what}"
        said = f"the IR equals the module {what} (largest difference {self.error:.1g})"
        rest = str(self.verdict).replace("\n", "\n  ")
        return f"{self.block.heading}\n  capture is right: {said}\n  {rest}"


@dataclass(frozen=True)
class ModelVerdict:
    """The verdicts on the distinct blocks of a model; ``str()`` is a text for people."""

    model: str
    blocks: tuple[BlockVerdict, ...]

    @property
    def is_wrong(self) -> bool:
        """Whether anything is wrong with any block."""
        return any(b.is_wrong for b in self.blocks)

    def __str__(self) -> str:
        if not self.blocks:
            return f"{self.model}: no MoE block found"
        return "\n".join(map(str, self.blocks))


def bisect_model(
    model: nn.Module,
    inputs: Any = None,
    *,
    target: str | None = None,
    training: bool = False,
    passes: str | None = None,
    seed: int = 0,
) -> ModelVerdict:
    """Find what makes a compiled model's results wrong: a capture, a pass, a rewrite or a kernel.

    Args:
        model: the model, compiled or not; it is not changed.
        inputs: a call of it, to test each block on what it gets there: a mapping of arguments, a
            tuple of them, or one tensor. ``None``: tokens are made up.
        target: "triton", "aten", or ``None`` for that of the model's device.
        training: with the backward pass.
        passes: a pipeline's text in place of the default one.
        seed: of what is made up.
    """
    named = _pipeline(model, target, training, passes)
    blocks = blocks_of(model, inputs, seed)
    found = tuple(_judged(block, *named, training, seed) for block in blocks)
    return ModelVerdict(type(model).__name__, found)


def _pipeline(
    model: nn.Module, target: str | None, training: bool, passes: str | None
) -> tuple[str, list[PassCall]]:
    parameter = next(model.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    chosen = target or choose_target(None, device)
    on_gpu = chosen == "triton" and torch.cuda.is_available()
    gpu = torch.device("cuda")
    descriptors = on_gpu and has_descriptors(gpu)
    text = pipeline(chosen, training, descriptors) if passes is None else passes
    return chosen, parse_pipeline(text)


# blocks and their calls
def blocks_of(
    model: nn.Module, inputs: Any = None, seed: int = 0, tokens: int = TOKENS
) -> list[Block]:
    """The distinct blocks of a model, each with a call: the one that it gets when the model is
    called with ``inputs``, or one with made-up tokens.
    """
    with as_original(model):
        groups: dict[str, list[FoundRegion]] = {}
        for region in find_regions(model):
            groups.setdefault(region.fingerprint or region.name, []).append(region)
        firsts = [group[0] for group in groups.values()]
        calls = {} if inputs is None else _recorded(model, inputs, firsts)
    return [_block(group, calls.get(group[0].module), seed, tokens) for group in groups.values()]


def _recorded(
    model: nn.Module, inputs: Any, regions: Sequence[FoundRegion]
) -> dict[nn.Module, tuple[torch.Tensor, ...]]:
    """The tensors that blocks are called with in one call of the model, its first of each block."""
    calls: dict[nn.Module, tuple[torch.Tensor, ...]] = {}

    def record(module: nn.Module, args: Any, kwargs: Any) -> None:
        call = read_call(type(module), args, kwargs)
        if module not in calls and not isinstance(call, str):
            calls[module] = tuple(t.detach() for t in call.tensors)

    hooks = [r.module.register_forward_pre_hook(record, with_kwargs=True) for r in regions]
    try:
        with torch.no_grad():
            _call(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _call(model: nn.Module, inputs: Any) -> None:
    if isinstance(inputs, Mapping):
        model(**inputs)
    elif isinstance(inputs, tuple | list):
        model(*inputs)
    elif isinstance(inputs, torch.Tensor):
        model(inputs)
    else:
        raise CompileError(
            "inputs is a call of the model: a mapping of arguments by name, a tuple of them, or "
            f"one tensor, not a {type(inputs).__name__}"
        )


def _block(
    group: Sequence[FoundRegion],
    call: tuple[torch.Tensor, ...] | None,
    seed: int,
    tokens: int,
) -> Block:
    found, places = group[0], tuple(r.name for r in group)
    if found.graph is None:
        return Block(found, places, (), (), False)
    count = len(found.graph.inputs) - len(found.weights)
    is_given = call is not None and len(call) == count and call[0].dim() in found.ranks
    data = call if is_given and call is not None else _made_up(found, count, seed, tokens)
    ranks = [v.type.rank for v in found.graph.inputs]
    fitted = data if found.kind == "experts" else graph_inputs(found.form, ranks, data)
    tensors = _tensors(found.module)
    weights = (tensors[path].detach() for path in found.weights)
    return Block(found, places, tuple(data), (*fitted, *weights), is_given)


def _made_up(found: FoundRegion, count: int, seed: int, tokens: int) -> tuple[torch.Tensor, ...]:
    graph = found.graph
    if graph is None:
        return ()
    device = next(found.module.parameters()).device
    drawn = random_inputs(graph, default_dims(graph, size=tokens), seed=seed)[:count]
    if found.kind != "experts" and drawn[0].dim() == 2 and 3 in found.ranks:
        drawn[0] = drawn[0].unsqueeze(0)
    return tuple(t.to(device) for t in drawn)


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


# judging
def _judged(
    block: Block, target: str, calls: Sequence[PassCall], training: bool, seed: int
) -> BlockVerdict:
    if block.found.graph is None:
        return BlockVerdict(block, 0.0, "", None)
    with as_original(block.found.module):
        error, problem = _capture_problem(block, training)
    if problem:
        return BlockVerdict(block, error, problem, None)
    arguments = arguments_of(block, target, seed)
    verdict = judge(
        block.graph, calls, target, _test(block, seed), lambda graph: [arguments(graph)]
    )
    return BlockVerdict(block, error, "", verdict)


def _test(block: Block, seed: int) -> StepTest:
    """On the block's own call, and on made-up inputs of small sizes, 0 and 1 among them."""
    here, elsewhere = same_results(block.inputs, seed), same_meaning(None, seed)

    def test(step: Step) -> str:
        return here(step) or elsewhere(step)

    return test


def arguments_of(
    block: Block, target: str, seed: int, is_timed: bool = False
) -> Callable[[Graph], list[torch.Tensor]]:
    """The arguments of a graph that the block's became, in its dtypes, where the target runs."""
    pairs = zip(block.inputs, block.graph.inputs, strict=True)
    inputs = [t.to(DTYPES[v.type.dtype]).contiguous() for t, v in pairs]
    placed = on_device_of(target, inputs, is_timed)
    return lambda graph: [*placed, *cotangents(graph, placed, seed)]


def _capture_problem(block: Block, training: bool) -> tuple[float, str]:
    """How far the captured IR is from the module, both in float64, and the problem in words."""
    module = _own_copy(block.found.module).to("cpu", torch.float64)
    data = [_double(t, training) for t in block.data]
    tensors = _tensors(module)
    weights = [tensors[path] for path in block.found.weights]
    with torch.set_grad_enabled(training):
        theirs = block.call(module, data)
        ranks = [v.type.rank for v in block.graph.inputs]
        is_block = block.found.kind != "experts"
        fitted = graph_inputs(block.found.form, ranks, data) if is_block else data
        ours = run(block.graph, [*fitted, *weights], float64=True)
    names = [f"%{v.hint}" for v in block.graph.outputs]
    worst = _worst(names, ours, theirs)
    if training and worst[0] <= _CAPTURE_TOLERANCE:
        worst = max(worst, _gradient_gap(block, ours, theirs, [*data, *weights]))
    size, name = worst
    if size <= _CAPTURE_TOLERANCE:
        return size, ""
    return size, f"{name} of the IR differs from the module's by {size:.2g} of its largest element"


def _own_copy(module: nn.Module) -> nn.Module:
    """A copy of a module with weights of its own; what compiling it left there is shared."""
    left = (vars(m).get(name) for m in module.modules() for name in ("_moec_region", "config"))
    return copy.deepcopy(module, {id(value): value for value in left if value is not None})


def _double(tensor: torch.Tensor, training: bool) -> torch.Tensor:
    is_float = tensor.is_floating_point()
    moved = tensor.detach().to("cpu", torch.float64 if is_float else tensor.dtype)
    return moved.requires_grad_(training and is_float)


def _worst(
    names: Sequence[str], ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]
) -> tuple[float, str]:
    """The largest relative difference, and where it is."""
    if len(ours) != len(theirs):
        return float("inf"), f"the number of results ({len(ours)}, the module has {len(theirs)})"
    gaps = (_gap(a, b) for a, b in zip(ours, theirs, strict=True))
    return max(zip(gaps, names, strict=True), default=(0.0, ""))


def _gap(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    if ours.numel() != theirs.numel():
        return float("inf")
    size = relative_error(ours.detach().reshape(theirs.shape), theirs.detach())
    return float("inf") if size != size else size


def _gradient_gap(
    block: Block,
    ours: Sequence[torch.Tensor],
    theirs: Sequence[torch.Tensor],
    leaves: Sequence[torch.Tensor],
) -> tuple[float, str]:
    """As :func:`_worst` for the gradients of random weights on all results."""
    wanted = [
        (f"the gradient of %{v.hint}", t)
        for v, t in zip(block.graph.inputs, leaves, strict=True)
        if t.requires_grad
    ]
    generator = torch.Generator().manual_seed(1)
    seeds = [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in theirs]
    found = [_gradients(side, seeds, [t for _, t in wanted]) for side in (ours, theirs)]
    return _worst([name for name, _ in wanted], *found)


def _gradients(
    results: Sequence[torch.Tensor], seeds: Sequence[torch.Tensor], leaves: list[torch.Tensor]
) -> Sequence[torch.Tensor]:
    pairs = [(r, s) for r, s in zip(results, seeds, strict=True) if r.requires_grad]
    if not pairs or not leaves:
        return [torch.zeros_like(t) for t in leaves]
    loss = sum((r * s.reshape(r.shape)).sum() for r, s in pairs)
    return torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)  # type: ignore[arg-type]


__all__ = ["TOKENS", "Block", "BlockVerdict", "ModelVerdict", "bisect_model", "blocks_of"]
