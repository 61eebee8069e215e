"""A compiled graph: the emitted module and how to call it, with and without autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.autograd import profiler

from moec import cache
from moec.codegen import emit_module
from moec.codegen.host import partition
from moec.errors import CallError
from moec.ir.graph import Graph, Value
from moec.manager import Step
from moec.runtime.captured import Captures
from moec.runtime.ranges import in_range, with_ranges
from moec.runtime.tapes import Tapes

# Up to so many tokens an artifact's ``few`` serves a call.
FEW_TOKENS = 32


class Once:
    """An artifact that is made when it is first asked for; ``None`` if it cannot be made."""

    def __init__(self, make: Callable[[Sequence[torch.Tensor]], Artifact | None]) -> None:
        self._make, self._made = make, False
        self._artifact: Artifact | None = None

    @classmethod
    def made_of(cls, artifact: Artifact | None) -> Once:
        """One that is there already, so that no call has to wait for it."""
        once = cls(lambda _: artifact)
        once.get(())
        return once

    def get(self, inputs: Sequence[torch.Tensor]) -> Artifact | None:
        """The artifact; ``inputs`` are those of the call that asks."""
        if not self._made:
            self._artifact, self._made = self._make(inputs), True
        return self._artifact

    @property
    def made(self) -> Artifact | None:
        """The artifact if it was asked for before."""
        return self._artifact


@dataclass(frozen=True, eq=False)
class Artifact:
    """One compiled graph for one target, for inference or for training.

    ``forward(*inputs)`` gives outputs and saved values; ``backward`` takes a list of the inputs at
    ``backward_inputs``, the saved values and the cotangents, which it empties. It serves every size
    of the token axes.

    ``few``, if there is one, serves calls of up to ``few_tokens`` tokens. For training on the
    ``aten`` target its gradients round as eager's: there, and at length 1 above all, gradients
    occur that are zero but for rounding (a query's, where there is one key), and memory does not
    matter. For inference on a GPU it has kernels for few rows, and ``tapes`` keeps what its calls
    launched. ``captures`` are calls as CUDA graphs, if that was asked for.
    """

    graph: Graph
    target: str
    mode: str
    path: Path
    forward: Callable[..., tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]]
    backward: Callable[..., tuple[torch.Tensor | None, ...]] | None
    backward_inputs: tuple[int, ...]
    saved: tuple[str, ...]
    program_saved: tuple[Value, ...] = ()
    history: tuple[Step, ...] = field(default=(), repr=False)
    few: Once | None = field(default=None, repr=False)
    few_tokens: int = FEW_TOKENS
    tapes: Tapes | None = field(default=None, repr=False)
    captures: Captures | None = field(default=None, repr=False)
    named: dict[str, Artifact] = field(default_factory=dict, repr=False)

    def __call__(
        self, inputs: Sequence[torch.Tensor], region: str = ""
    ) -> tuple[torch.Tensor, ...]:
        """The outputs; differentiable if this is a training artifact.

        A profiler that runs shows the time under the name of ``region``.
        """
        if self.few is not None and inputs[0].shape[:-1].numel() <= self.few_tokens:
            few = self.few.get(inputs)
            if few is not None:
                return few(inputs, region)
        used = self.in_ranges(region) if profiler._is_profiler_enabled else self
        contiguous = [t if t.is_contiguous() else t.contiguous() for t in inputs]
        if self.tapes is not None and used is self:
            repeated = self.tapes.call(self.forward, contiguous)
            if repeated is not None:
                return repeated
        if self.captures is not None and used is self:
            captured = self.captures.call(self.forward, contiguous)
            if captured is not None:
                return captured
        # kernels go to the current device; on the CPU this does nothing
        with torch.cuda.device_of(inputs[0]):  # type: ignore[no-untyped-call]
            if used.backward is None:
                return used.forward(*contiguous)[0]
            outputs: tuple[torch.Tensor, ...]
            outputs = _Differentiable.apply(used, *contiguous)  # type: ignore[no-untyped-call]
            return outputs

    def signature(self, is_backward: bool) -> tuple[Sequence[Value], Sequence[Value]]:
        """What a pass takes and returns as an operation of a tracer's graph."""
        graph = self.graph
        if not is_backward:
            return graph.inputs, (*graph.outputs, *self.program_saved)
        inputs = (graph.inputs[i] for i in self.backward_inputs)
        gradients = [g for g in graph.gradients if g is not None]
        return (*inputs, *self.program_saved, *graph.cotangents), gradients

    def in_ranges(self, region: str) -> Artifact:
        """The same artifact, whose kernels a profiler shows under the name of a region."""
        region = region or f"@{self.graph.name}"
        if region not in self.named:
            module = with_ranges(self.graph, self.target, self.path)
            ahead, behind = getattr(module, "forward", None), getattr(module, "backward", None)
            backward = self.backward
            if backward is not None:
                backward = in_range(region, "backward", backward, behind)
            forward = in_range(region, "forward", self.forward, ahead)
            self.named[region] = replace(
                self, forward=forward, backward=backward, few=None, tapes=None
            )
        return self.named[region]

    def try_out(self, inputs: Sequence[torch.Tensor]) -> None:
        """Run forward and backward on one token, so that every kernel is compiled and launched
        once.

        Raises whatever the kernel compiler or the launch raises.
        """
        data = [t.detach() for t in inputs]
        symbolic = {
            v for v in self.graph.inputs if any(not isinstance(d, int) for d in v.type.shape)
        }
        first = [
            t[:1].contiguous() if v in symbolic else t.contiguous()
            for t, v in zip(data, self.graph.inputs, strict=True)
        ]
        with torch.no_grad():
            outputs, saved = self.forward(*first)
            if self.backward is not None:
                cotangents = [torch.zeros_like(o) for o in outputs if o.is_floating_point()]
                self.backward([*(first[i] for i in self.backward_inputs), *saved, *cotangents])


def build(
    graph: Graph,
    target: str,
    mode: str,
    history: Sequence[Step],
    directory: str | Path | None = None,
) -> Artifact:
    """Emit, store and import a lowered graph."""
    source = emit_module(graph, target)
    path = cache.store(source, f"{graph.name}_{target}_{mode}".lower(), directory)
    module = cache.load(path, source)
    return Artifact(
        graph,
        target,
        mode,
        path,
        module.forward,
        getattr(module, "backward", None),
        tuple(module.BACKWARD_INPUTS),
        tuple(module.SAVED),
        partition(graph).saved,
        tuple(history),
    )


class _Differentiable(torch.autograd.Function):
    """Runs an artifact's forward, and its backward when autograd asks."""

    @staticmethod
    def forward(ctx: Any, artifact: Artifact, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs, saved = artifact.forward(*inputs)
        ctx.artifact = artifact
        ctx.save_for_backward(*(inputs[i] for i in artifact.backward_inputs), *saved)
        ctx.mark_non_differentiable(*(o for o in outputs if not o.is_floating_point()))
        return outputs

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        artifact: Artifact = ctx.artifact
        if torch.is_grad_enabled():  # what came out would look constant, not fail
            raise CallError(
                f"@{artifact.graph.name}: a compiled block has no second derivative "
                "(create_graph=True); take it from the original model, which has the same "
                "parameters"
            )
        floats = [
            c.contiguous()
            for c, o in zip(cotangents, artifact.graph.outputs, strict=True)
            if o.type.is_float
        ]
        if artifact.backward is None:
            raise RuntimeError("an inference artifact has no backward")
        held = [*ctx.saved_tensors, *floats]
        ctx.maybe_clear_saved_tensors()  # a retained graph keeps them; others go when last read
        return (None, *artifact.backward(held))
