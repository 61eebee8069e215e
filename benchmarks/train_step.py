"""One implementation of one block at one size: times, memory and errors of a training step."""

import functools
import gc
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import DeviceType

import moec

from .block import compiled_grouped, with_experts
from .hf_blocks import LOGIT_MARGIN, ROTATION, Shape, olmoe, random_block
from .reference import Weights, clear_choices, reference, relative_error
from .sonic import SonicMoE, check_equal, in_order

MILLISECONDS = 400.0  # that one measurement may take
PROFILED = 5  # calls
AHEAD = 256  # tokens with which kernels are compiled


@dataclass(frozen=True)
class Size:
    """Tokens and sizes of a block, and how the tokens spread over the experts."""

    tokens: int
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    zipf: float = 0.0  # each expert's logits are higher by this times the log of its rank

    @property
    def shape(self) -> Shape:
        """As a block of OLMoE's class, a softmax over all experts before the choice."""
        sizes = (self.hidden, self.intermediate, self.experts, self.top_k)
        return Shape(olmoe, *sizes, normalise=False)

    @property
    def flops(self) -> float:
        """Floating-point operations of the experts' forward pass."""
        return 6.0 * self.tokens * self.top_k * self.hidden * self.intermediate


SIZES = {
    "s1.4b-n256": Size(40960, 768, 256, 128, 8),
    "s7b-n256": Size(24576, 1536, 256, 128, 8),
    "s7b-n512": Size(24576, 1536, 512, 64, 4),
    "s7b-n1024": Size(24576, 1536, 1024, 32, 2),
    "s30b-n256": Size(32768, 4096, 256, 256, 16),
    "s30b-n512": Size(32768, 4096, 512, 128, 8),
    "s30b-n1024": Size(32768, 4096, 1024, 64, 4),
    "s120b-n1024": Size(32768, 4096, 1024, 128, 8),
    "qwen3-30b": Size(16384, 2048, 768, 128, 8),
    "olmoe": Size(16384, 2048, 1024, 64, 8),
    "mixtral-8x7b": Size(8192, 4096, 14336, 8, 2),
    "qwen3-30b-zipf": Size(16384, 2048, 768, 128, 8, zipf=0.5),
    # for a look at the script itself, on any machine; left out unless asked for
    "tiny": Size(64, 64, 32, 8, 2),
}
MODELS: dict[str, Callable[[Any], Any]] = {
    "moec": moec.compile,
    "moec without Gluon": lambda block: moec.compile(block, options={"gluon": False}),
    "moec repro": lambda block: moec.compile(block, options={"numerics": "repro"}),
    "moec token rounding": lambda block: moec.compile(block, options={"token_rounding": 128}),
    "grouped_mm": lambda block: with_experts(block, "grouped_mm"),
    "grouped_mm + torch.compile": compiled_grouped,
    "eager": lambda block: with_experts(block, "eager"),
    "sonicmoe": SonicMoE,
}
NAMES = ("gate.weight", "experts.gate_up_proj", "experts.down_proj")

OTHER_ROUTING = "moec token rounding"  # there is no error against the routing that is another


def draw(block: Any, size: Size) -> list[Tensor]:
    """ROTATION inputs [1, T, H] on which every correct implementation routes alike."""
    weight = block.gate.weight.detach()
    if size.zipf:
        ranks = torch.arange(1, size.experts + 1, device=weight.device)
        weight[:, 0] = -2 * size.zipf * ranks.log().to(weight.dtype)
    found, wanted = list[Tensor](), size.tokens * ROTATION
    while sum(map(len, found)) < wanted:
        rows = torch.randn(size.tokens, size.hidden, device=weight.device, dtype=weight.dtype)
        if size.zipf:
            rows[:, 0] = 1
        found.append(clear_choices(weight, rows, size.top_k, LOGIT_MARGIN))
    return list(torch.cat(found)[:wanted].view(ROTATION, 1, size.tokens, size.hidden))


class Step:
    """Forward, and forward with backward, of a model on rotating inputs."""

    def __init__(self, model: Any, block: Any, inputs: list[Tensor]) -> None:
        self.model, self.parameters = model, _parameters(model, block)
        self.inputs = [x.requires_grad_() for x in inputs]
        self.gradient = torch.randn_like(inputs[0])

    def forward(self, turn: int) -> Any:
        """The output, with what its backward pass needs."""
        return self.model(self.inputs[turn % ROTATION])

    def both(self, turn: int) -> tuple[Tensor, ...]:
        """Gradients of the input and of every parameter."""
        x = self.inputs[turn % ROTATION]
        return torch.autograd.grad(self.model(x), [x, *self.parameters], self.gradient)

    def results(self) -> dict[str, Tensor]:
        """Output, and gradients by the block's own names, of the first input."""
        found = dict(zip(("hidden", *NAMES), self.both(0), strict=True))
        if isinstance(self.model, SonicMoE):
            found[NAMES[1]] = in_order(found[NAMES[1]])
        return found | {"output": self.forward(0).detach()}


def _parameters(model: Any, block: Any) -> list[Tensor]:
    """Router, first and second projection: the block's own, but for what needs another order."""
    found = [block.get_parameter(name) for name in NAMES]
    return [found[0], model.gate_up, found[2]] if isinstance(model, SonicMoE) else found


def median_ms(call: Callable[[int], object], device: str) -> float:
    """The median time of calls in a row; the host runs ahead, as in training."""
    if device != "cuda":
        start = time.perf_counter()
        call(0)
        return 1e3 * (time.perf_counter() - start)
    first = _times(call, 3)[-1]
    return statistics.median(_times(call, max(5, min(40, int(MILLISECONDS / first)))))


def _times(call: Callable[[int], object], count: int) -> list[float]:
    events: list[Any] = [
        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        for _ in range(count + 1)
    ]
    events[0].record()
    for turn, event in enumerate(events[1:]):
        call(turn)
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(events)]


def memory(step: Step) -> dict[str, float]:
    """MiB held between forward and backward without the output; peak without the gradients."""
    step.both(0)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output = step.forward(0)
    held = torch.cuda.memory_allocated() - before - output.numel() * output.element_size()
    x = step.inputs[0]
    gradients = torch.autograd.grad(output, [x, *step.parameters], step.gradient)
    returned = sum(g.numel() * g.element_size() for g in gradients)
    peak = torch.cuda.max_memory_allocated() - before - returned
    return {"held_mib": held / 2**20, "peak_mib": peak / 2**20}


def errors(step: Step, block: Any, size: Size) -> dict[str, float]:
    """Relative errors against float64 of the output and of each gradient."""
    experts = block.experts
    weights = Weights(block.gate.weight, experts.gate_up_proj, experts.down_proj)
    kept = {0, size.experts // 2, size.experts - 1}
    expected = reference(
        weights,
        step.inputs[0][0].detach(),
        step.gradient[0],
        top_k=size.top_k,
        normalise=False,
        activation=experts.act_fn,
        kept=kept,
    )
    actual = step.results()
    found = {
        "output": relative_error(actual["output"][0], expected.output),
        "hidden": relative_error(actual["hidden"][0], expected.hidden),
        "router": relative_error(actual["gate.weight"], expected.router),
    }
    for name, wanted in (("gate_up_proj", expected.gate_up), ("down_proj", expected.down)):
        gradient = actual[f"experts.{name}"]
        found[name] = max(relative_error(gradient[e], value) for e, value in wanted.items())
    return found


def bound(size: Size, device: str) -> dict[str, float]:
    """The six products alone, as library products of equal groups: no routing, no activation."""
    rows = size.tokens * size.top_k // size.experts
    h, i, e = size.hidden, size.intermediate, size.experts
    make = functools.partial(torch.randn, device=device, dtype=torch.bfloat16)
    x, dy, act, dh = make(e, rows, h), make(e, rows, h), make(e, rows, i), make(e, rows, 2 * i)
    first, second = make(e, 2 * i, h), make(e, h, i)

    def forward(turn: int) -> None:
        torch.bmm(x, first.mT)
        torch.bmm(act, second.mT)

    def both(turn: int) -> None:
        forward(turn)
        torch.bmm(dy, second)
        torch.bmm(dy.mT, act)
        torch.bmm(dh, first)
        torch.bmm(dh.mT, x)

    return {"forward_ms": median_ms(forward, device), "both_ms": median_ms(both, device)}


def gpu_ms(call: Callable[[int], object]) -> float:
    """Milliseconds of work on the GPU a call, without gaps in which it waits for the host."""
    kinds = [torch.profiler.ProfilerActivity.CUDA]
    for calls in (1, PROFILED):  # the first has what setting up the profiler costs
        with torch.profiler.profile(activities=kinds) as profile:
            for turn in range(calls):
                call(turn)
            torch.cuda.synchronize()
    on_gpu = (e for e in profile.events() or () if e.device_type == DeviceType.CUDA)
    busy, last = 0.0, float("-inf")
    for start, end in sorted((e.time_range.start, e.time_range.end) for e in on_gpu):
        busy, last = busy + max(0.0, end - max(start, last)), max(last, end)  # they may overlap
    return busy * 1e-3 / PROFILED


def compile_ahead(name: str, implementation: str) -> None:
    """Compile kernels at few tokens: what is left to do when the GPU is this process' own."""
    if implementation in MODELS and implementation != "sonicmoe":  # it tunes by the tokens
        size = replace(SIZES[name], tokens=AHEAD)
        block = random_block(size.shape, "cuda", torch.bfloat16)
        inputs = list(torch.randn(ROTATION, 1, AHEAD, size.hidden, device="cuda").bfloat16())
        Step(MODELS[implementation](block), block, inputs).both(0)
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.empty_cache()


def measure(name: str, implementation: str, device: str, accurate: bool) -> dict[str, Any]:
    """One row of the table."""
    torch.manual_seed(0)
    size = SIZES[name]
    row: dict[str, Any] = {"size": name, "implementation": implementation}
    if implementation == "bound":
        return row | rates(size, bound(size, device))
    block = random_block(size.shape, device, torch.bfloat16 if device == "cuda" else torch.float32)
    step = Step(MODELS[implementation](block), block, draw(block, size))
    if implementation == "sonicmoe":
        _check_as_grouped(step, block)
        gc.collect()
    if accurate and implementation != OTHER_ROUTING:
        row["errors"] = errors(step, block, size)
        gc.collect()
    step.both(0)
    found = {
        "forward_ms": median_ms(step.forward, device),
        "both_ms": median_ms(step.both, device),
    }
    row |= rates(size, found)
    if device == "cuda":
        forward = gpu_ms(step.forward)
        times = {"forward_gpu_ms": forward, "backward_gpu_ms": gpu_ms(step.both) - forward}
        row |= memory(step) | times
    return row


def _check_as_grouped(step: Step, block: Any) -> None:
    """Compare what is not moec's with transformers' own products, before it is timed."""
    same = Step(MODELS["grouped_mm"](block), block, step.inputs)
    same.gradient = step.gradient
    check_equal(step.results(), same.results())


def rates(size: Size, found: dict[str, float]) -> dict[str, float]:
    """The times, and TFLOP/s of forward, backward and both."""
    forward, both = found["forward_ms"], found["both_ms"]
    backward = max(both - forward, 1e-6)
    parts = {"forward": (1, forward), "backward": (2, backward), "both": (3, both)}
    return found | {f"{k}_tflops": n * size.flops / t * 1e-9 for k, (n, t) in parts.items()}
