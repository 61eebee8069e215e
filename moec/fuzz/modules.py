"""Random MoE blocks as a user writes them, through ``moec.compile`` against themselves.

A block is a router, experts in one of several styles of code, and what people put around them. The
compiled copy must give the results and gradients of the original, at lengths from 0 on, for
routings made to be awkward, in evaluation and in training; what moec does not understand it must
leave alone. Half of the blocks are in float64, where a wrong program cannot hide behind rounding.
"""

from __future__ import annotations

import copy
import json
import random
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import moec
from moec.bisect import relative_error
from moec.fuzz.styles import EXPERTS, MoeBlock, StyleOptions

LENGTHS = ((2, 7), (1, 1), (1, 33), (3, 0), (1, 2))
ROUTINGS = ("random", "one", "saturated", "zeros")
_LIMIT = {"float64": 1e-9, "float32": 3e-4}
# What an option is when a failure does not depend on it: tried one by one by the reduction.
_PLAIN = StyleOptions()


@dataclass(frozen=True)
class Call:
    """One call of a block: batch and length, routing, mode."""

    batch: int
    length: int
    routing: str
    training: bool

    def __str__(self) -> str:
        mode = "training" if self.training else "evaluation"
        return f"{self.batch} x {self.length} tokens, routing {self.routing}, {mode}"


def random_style(seed: int) -> StyleOptions:
    """The options of a seed."""
    r = random.Random(f"module {seed}")
    experts = r.choice((2, 3, 4, 8))
    grouped = experts == 8 and r.random() < 0.4
    choices = r.choice([k for k in (1, 2, 3, experts) if k <= (4 if grouped else experts)])
    return StyleOptions(
        style=r.choice(sorted(EXPERTS)),
        experts=experts,
        choices=choices,
        hidden=r.choice((4, 6, 16)),
        inner=r.choice((3, 8, 10)),
        score=r.choice(("softmax", "sigmoid", "late softmax", "late sigmoid")),
        norm=r.choice(("none", "sum", "eps", "clamp")),
        scale=r.choice((1.0, 1.0, 2.5)),
        groups=r.choice((2, 4)) if grouped else 1,
        selection_bias=r.random() < 0.3,
        gate_bias=r.random() < 0.3,
        upcast=r.random() < 0.5,
        gated=r.random() < 0.7,
        fused=r.random() < 0.5,
        interleaved=r.random() < 0.2,
        transposed=r.random() < 0.3,
        biases=r.random() < 0.3,
        activation=r.choice(("silu", "gelu", "gelu_tanh", "relu2", "clamped", "mish", "tanh")),
        weights_first=r.random() < 0.15,
        shared=r.choice(("none", "none", "plain", "gated")),
        returns=r.choice(("y", "y", "logits", "loss")),
        residual=r.random() < 0.2,
        norm_first=r.random() < 0.2,
        dtype=r.choice(("float64", "float32")),
    )


def block(options: StyleOptions, seed: int) -> MoeBlock:
    """The block with random weights of unit-scale products."""
    torch.manual_seed(seed)
    made = MoeBlock(options)
    with torch.no_grad():
        for parameter in made.parameters():
            size = parameter.shape[-1] if parameter.dim() > 1 else 4
            parameter.copy_(torch.randn(parameter.shape) / size**0.5)
        if options.selection_bias:
            made.selection_bias.copy_(torch.randn(options.experts) * 0.3)
    return made.to(getattr(torch, options.dtype))


def calls(seed: int) -> Iterator[Call]:
    """The calls that a block is compared at."""
    r = random.Random(f"calls {seed}")
    for batch, length in LENGTHS:
        for training in (False, True):
            yield Call(batch, length, r.choice(ROUTINGS), training)


def problem_of_style(options: StyleOptions, seed: int) -> str:
    """What is wrong with a compiled block, in words; nothing if it is its original's equal."""
    original = block(options, seed)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # blocks left alone are warned of
            compiled = moec.compile(copy.deepcopy(original))
            for call in calls(seed):
                problem = _problem_of_call(original, compiled, call, seed)
                if problem:
                    return f"{problem}\n  at {call}"
    except Exception as error:  # whatever moec raises where the original does not is wrong
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(frame.filename).name}:{frame.lineno}"
        return f"raises {type(error).__name__} at {place}: {str(error).splitlines()[:1]}"
    return ""


def _problem_of_call(original: MoeBlock, compiled: nn.Module, call: Call, seed: int) -> str:
    x = _tokens(original, call, seed)
    _route(original, call.routing)
    _copy_weights(original, compiled)
    try:
        expected = _results(original, x, call)
    except Exception:  # the block's own code does not take this input
        return ""
    found = _results(compiled, x, call)
    limit = _LIMIT[original.options.dtype]
    largest = max(
        (float(t.abs().nan_to_num().max()) for t in expected.values() if t.numel()), default=1
    )
    for name, wanted in expected.items():
        got = found.get(name, torch.zeros_like(wanted))  # a gradient of zeros may be absent
        if got.shape != wanted.shape:
            return f"{name} has shape {tuple(got.shape)}, not {tuple(wanted.shape)}"
        # what is zero in exact arithmetic is noise, next to the others
        size = relative_error(got, wanted)
        if not size <= limit and not _gap(got, wanted) <= limit * 1e-2 * largest:
            return f"{name} is off by {size:.2g} of its largest element"
    return ""


def _gap(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).abs().max()) if got.numel() else 0.0


def _tokens(original: MoeBlock, call: Call, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + call.length)
    shape = (call.batch, call.length, original.options.hidden)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if call.routing == "zeros":
        x.zero_()
    if call.routing == "one" and x.numel():
        x = x[:1, :1].expand(shape).clone()
    return x.to(getattr(torch, original.options.dtype))


def _route(original: MoeBlock, routing: str) -> None:
    """Set the scale of the router's weights."""
    with torch.no_grad():
        weight = original.gate.weight
        weight.div_(weight.abs().amax() + 1e-30)
        weight.mul_(100.0 if routing == "saturated" else 1.0)


def _copy_weights(original: nn.Module, compiled: nn.Module) -> None:
    compiled.load_state_dict(original.state_dict())


def _results(module: nn.Module, x: torch.Tensor, call: Call) -> dict[str, torch.Tensor]:
    """Tensors of the result, and gradients by name in training."""
    module.train(call.training)
    module.zero_grad(set_to_none=True)
    leaf = x.clone().requires_grad_(call.training)
    with torch.set_grad_enabled(call.training):
        result = module(leaf)
    tensors: Sequence[Any] = result if isinstance(result, tuple) else (result,)
    found = {f"result {i}": t.detach() for i, t in enumerate(tensors)}
    if call.training:
        loss = sum((t * _cotangent(t)).sum() for t in tensors if t.requires_grad)
        if isinstance(loss, torch.Tensor):
            loss.backward()  # type: ignore[no-untyped-call]
        named = [("input", leaf), *module.named_parameters()]
        found |= {f"gradient of {n}": p.grad for n, p in named if p.grad is not None}
    return found


def _cotangent(t: torch.Tensor) -> torch.Tensor:
    return torch.linspace(-1, 1, t.numel(), dtype=t.dtype).reshape(t.shape) + 0.1


def reduced_style(options: StyleOptions, seed: int) -> StyleOptions:
    """The options with as many set to plain ones as the failure allows."""
    for field in fields(options):
        plain = replace(options, **{field.name: getattr(_PLAIN, field.name)})
        if plain != options and plain.is_valid and problem_of_style(plain, seed):
            options = plain
    return options


def problems_of(seed: int, folder: Path) -> list[str]:
    """Ask a seed's block; a failure is reduced and written into ``folder``."""
    options = random_style(seed)
    problem = problem_of_style(options, seed)
    if not problem:
        return []
    small = reduced_style(options, seed)
    words = problem_of_style(small, seed)
    path = folder / f"module-{seed}.json"
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"seed": seed, "problem": words, "options": asdict(small)}, indent=2)
    path.write_text(text + "\n", encoding="utf-8")
    return [f"{problem}\n  saved in {path}"]


def problem_of_saved(path: Path) -> str:
    """What is wrong with a saved failure today."""
    saved = json.loads(path.read_text(encoding="utf-8"))
    return problem_of_style(StyleOptions(**saved["options"]), saved["seed"])


__all__ = ["problem_of_saved", "problem_of_style", "problems_of", "random_style", "reduced_style"]
