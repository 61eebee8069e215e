"""Running a graph's emitted module on given inputs, beside the interpreter, and timing its ops."""

from __future__ import annotations

import contextlib
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moec import cache
from moec.codegen import emit_module
from moec.errors import PassError
from moec.inputs import default_dims, random_inputs
from moec.ir.graph import Graph, Op
from moec.runtime.artifact import build
from moec.timing import cpu_seconds, event

# The name under which an emitted module finds what is called after each of its ops.
_MARK = "moec_after_op"
_WARM_UP, _ROUNDS = 1, 21


@dataclass(frozen=True)
class Emitted:
    """A graph's emitted module, ready to run: first forward, then backward if the graph has one."""

    graph: Graph
    module: Any

    def __call__(self, arguments: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Outputs, then the gradients that exist.

        ``arguments`` are the inputs, then one cotangent for each output of a joint graph (those of
        integer outputs are ignored), as for :func:`moec.interp.run`.
        """
        graph = self.graph
        inputs, cotangents = arguments[: len(graph.inputs)], arguments[len(graph.inputs) :]
        outputs: tuple[torch.Tensor, ...]
        with torch.no_grad():
            outputs, saved = self.module.forward(*(t.contiguous() for t in inputs))
            if not graph.cotangents:
                return outputs
            kept = (inputs[i] for i in self.module.BACKWARD_INPUTS)
            gradients = self.module.backward([*kept, *saved, *cotangents])
        wanted = [g is not None for g in graph.gradients]
        found = (g for g, is_wanted in zip(gradients, wanted, strict=True) if is_wanted)
        return (*outputs, *(g for g in found if g is not None))


@contextlib.contextmanager
def emitted(
    graph: Graph, target: str, after_op: Callable[[int], object] | None = None
) -> Iterator[Emitted]:
    """A graph's module for a target, emitted into a folder that is gone after the context.

    ``after_op``, if given, is called by the module after each op, with the op's place in the graph.
    Raises whatever the emitter, the kernel compiler or a launch raises.
    """
    places = {op: place for place, op in enumerate(graph.ops)}
    mark = None if after_op is None else lambda op: f"{_MARK}({places[op]})"
    with tempfile.TemporaryDirectory() as folder:
        source = emit_module(graph, target, mark)
        path = cache.store(source, f"{graph.name}_{target}".lower(), folder)
        module = cache.load(path, source)
        vars(module)[_MARK] = after_op
        yield Emitted(graph, module)


def run_emitted(
    graph: Graph, target: str, arguments: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """Emit a graph for a target and run it once; see :class:`Emitted`."""
    with emitted(graph, target) as program:
        return program(arguments)


def on_device_of(
    target: str, arguments: Sequence[torch.Tensor], is_timed: bool = False
) -> list[torch.Tensor]:
    """The arguments where a target's modules run: for ``triton`` on the GPU or, without one, under
    Triton's interpreter, whose times (``is_timed``) say nothing.

    Raises :class:`~moec.errors.PassError` where the target cannot run.
    """
    if target != "triton":
        return list(arguments)
    if torch.cuda.is_available():
        return [a.cuda() for a in arguments]
    import triton

    if is_timed or not triton.knobs.runtime.interpret:
        remedy = (
            "" if is_timed else "set TRITON_INTERPRET=1 to run them in Triton's interpreter, or "
        )
        raise PassError(f"no GPU here to run Triton kernels on; {remedy}choose --target aten")
    return list(arguments)


def op_times(
    graph: Graph,
    target: str,
    arguments: Sequence[torch.Tensor],
    rounds: int | None = None,
    look: Callable[[Sequence[torch.Tensor]], object] | None = None,
) -> dict[Op, float]:
    """Median milliseconds of each op of the emitted module, measured where it stands in it.

    On a GPU these are times between events: what an op waits for is counted as its own. ``look``
    is called with the results of a first run, which is not timed; see :class:`Emitted`.
    """
    stamps = _Stamps(arguments[0].device)
    found: dict[Op, list[float]] = {op: [] for op in graph.ops}
    with emitted(graph, target, stamps.after_op) as program:
        results = program(arguments)
        if look is not None:
            look(results)
        del results
        for turn in range(-_WARM_UP, rounds or _ROUNDS):
            stamps.begin()
            program(arguments)
            for place, took in stamps.end().items():
                if turn >= 0:
                    found[graph.ops[place]].append(took)
    return {op: statistics.median(times) for op, times in found.items() if times}


class _Stamps:
    """The moments after each op of one run."""

    def __init__(self, device: torch.device) -> None:
        self.is_gpu = device.type == "cuda"
        self.taken: list[tuple[int, Any]] = []

    def begin(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize()
        self.taken = []
        self.after_op(-1)

    def after_op(self, place: int) -> None:
        if self.is_gpu:
            now = event()
            now.record()
        else:
            now = cpu_seconds()
        self.taken.append((place, now))

    def end(self) -> dict[int, float]:
        """Milliseconds by place; a constant that is made on both sides counts twice."""
        if self.is_gpu:
            torch.cuda.synchronize()
        found: dict[int, float] = {}
        for (_, before), (place, after) in zip(self.taken, self.taken[1:], strict=False):
            took = before.elapsed_time(after) if self.is_gpu else 1e3 * (after - before)
            found[place] = found.get(place, 0.0) + took
        return found


def try_emitted(graph: Graph, target: str) -> None:
    """Emit a graph and run it on one generated token, on this machine's GPU if it has one.

    Raises whatever the emitter, the kernel compiler or a launch raises.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = random_inputs(graph, default_dims(graph, size=1))[: len(graph.inputs)]
    with tempfile.TemporaryDirectory() as folder:
        build(graph, target, "execute", (), folder).try_out([t.to(device) for t in inputs])


__all__ = ["Emitted", "emitted", "on_device_of", "op_times", "run_emitted", "try_emitted"]
