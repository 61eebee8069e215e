"""Observers: verify, print, dump, time, trace, count, check. The only hook around a pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import torch

from moec import trace_events
from moec.errors import MeaningError
from moec.files import write_whole
from moec.inputs import default_dims, dim_names, random_inputs
from moec.interp import run
from moec.ir.graph import Graph, Value
from moec.ir.text import show
from moec.ir.verify import verify
from moec.manager import PassCall, Step

Row = tuple[str, ...]
# Float64 sums in another order differ by far less; a wrong rewrite by far more.
_TOLERANCE = 1e-9


class Observer:
    """Watches nothing; the others override what they need."""

    def before(self, call: PassCall, graph: Graph, index: int) -> None:
        """Called with the graph that pass number ``index`` (from 0) is about to get."""

    def after(self, step: Step, index: int) -> None:
        """Called with what the pass did."""


class Verify(Observer):
    """Raise :class:`~moec.errors.IRError` where a pass leaves a graph that breaks a rule of the IR.

    The graph that the first pass gets is verified too, so that a pass is not blamed for its input.
    """

    def before(self, call: PassCall, graph: Graph, index: int) -> None:
        if index == 0:
            verify(graph)

    def after(self, step: Step, index: int) -> None:
        verify_step(step)


def verify_step(step: Step) -> None:
    """Raise :class:`~moec.errors.IRError` if the pass left a graph that breaks a rule of the IR."""
    verify(step.after, dialects=step.call.definition.leaves, after=str(step.call))


class Print(Observer):
    """Write the graph after the passes called ``names`` (``None``: after all that changed it)."""

    def __init__(self, names: Collection[str] | None, write: Callable[[str], object]) -> None:
        self.names, self.write = names, write

    def after(self, step: Step, index: int) -> None:
        name = step.call.definition.name
        if step.changed if self.names is None else name in self.names:
            self.write(f"// after {name} (pass {index + 1}): {summary(step)}\n{show(step.after)}")


class PrintBefore(Observer):
    """Write the graph that the passes called ``names`` (``None``: all of them) are about to get."""

    def __init__(self, names: Collection[str] | None, write: Callable[[str], object]) -> None:
        self.names, self.write = names, write

    def before(self, call: PassCall, graph: Graph, index: int) -> None:
        name = call.definition.name
        if self.names is None or name in self.names:
            head = f"// before {name} (pass {index + 1}): {len(graph.ops)} ops"
            self.write(f"{head}\n{show(graph)}")


class Dump(Observer):
    """Write ``FOLDER/00-input.moe`` and, for each pass that changed it, ``07-fuse-gemm.moe``.

    The folder is made if it is missing. Each file reads back as a graph.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def before(self, call: PassCall, graph: Graph, index: int) -> None:
        if index == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write("00-input.moe", f"// {len(graph.ops)} ops", graph)

    def after(self, step: Step, index: int) -> None:
        if step.changed:
            name = f"{index + 1:02}-{step.call.definition.name}.moe"
            self._write(name, f"// {summary(step)}", step.after)

    def _write(self, name: str, header: str, graph: Graph) -> None:
        write_whole(self.folder / name, f"{header}\n{show(graph)}".encode())


def summary(step: Step) -> str:
    """``9 -> 8 ops, 2 rewrites, 1.3 ms``."""
    rewrites = "1 rewrite" if step.rewrites == 1 else f"{step.rewrites} rewrites"
    sizes = f"{len(step.before.ops)} -> {len(step.after.ops)} ops"
    return f"{sizes}, {rewrites}, {step.seconds * 1e3:.1f} ms"


class Time(Observer):
    """The time of each pass, in order; ``str()`` is a table."""

    def __init__(self) -> None:
        self.seconds: list[tuple[str, float]] = []

    def after(self, step: Step, index: int) -> None:
        self.seconds.append((str(step.call), step.seconds))

    def rows(self) -> list[Row]:
        """Pass, milliseconds and share of the whole; the last row is the whole."""
        total = sum(s for _, s in self.seconds)
        shares = [(n, s, s / total if total else 0.0) for n, s in self.seconds]
        whole = ("all passes", total, 1.0 if self.seconds else 0.0)
        return [(n, f"{s * 1e3:.2f}", f"{share:.0%}") for n, s, share in [*shares, whole]]

    def __str__(self) -> str:
        return table(("pass", "ms", "share"), self.rows())


class TracePasses(Observer):
    """An event for each pass; the last observer of all, so that the others' time is not counted."""

    def __init__(self) -> None:
        self._start = 0

    def before(self, call: PassCall, graph: Graph, index: int) -> None:
        self._start = time.perf_counter_ns()

    def after(self, step: Step, index: int) -> None:
        events = trace_events.current()
        if events is None:
            return
        ops = {"ops before": len(step.before.ops), "ops after": len(step.after.ops)}
        end = self._start + int(step.seconds * 1e9)
        events.add(str(step.call), "pass", self._start, end, **ops, rewrites=step.rewrites)


class Stats(Observer):
    """How many rewrites each pass made and how many ops it left; ``str()`` is a table."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, int, int, int]] = []

    def after(self, step: Step, index: int) -> None:
        counts = (step.rewrites, len(step.before.ops), len(step.after.ops))
        self.steps.append((str(step.call), *counts))

    def rows(self) -> list[Row]:
        """Pass, rewrites, ops before and ops after."""
        return [tuple(map(str, row)) for row in self.steps]

    def __str__(self) -> str:
        return table(("pass", "rewrites", "ops before", "ops after"), self.rows())


def table(heads: Row, rows: Sequence[Row]) -> str:
    """Plain text in columns: the first to the left, the others, numbers, to the right."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]

    def line(row: Row) -> str:
        numbers = (cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))
        return "  ".join([row[0].ljust(widths[0]), *numbers]).rstrip()

    return "\n".join(map(line, [heads, *rows]))


class Check(Observer):
    """Interpret the graph before and after every pass that changed it, in float64, and compare.

    ``dims`` fixes sizes by name; others are small and inside their ranges. Every graph is tried at
    these sizes and, where its ranges allow, with every free size 0 and 1. A pass that adds
    gradients is compared with PyTorch's own differentiation of the graph before it; one that is
    there to change the meaning is not compared. Raises
    :class:`~moec.errors.MeaningError` naming pass, value, difference and sizes.
    """

    def __init__(self, dims: Mapping[str, int] | None = None, seed: int = 0) -> None:
        self.dims, self.seed = dict(dims or {}), seed

    def after(self, step: Step, index: int) -> None:
        if not step.changed or step.call.definition.changes_meaning:
            return
        for sizes in self._sizes(step.before):
            expected, got = self._results(step, sizes)
            for value, a, b in zip(step.after.returned, expected, got, strict=True):
                problem = difference(a, b)
                if problem:
                    message = self._message(step, value, problem, sizes)
                    raise MeaningError(message, sizes, self.seed)

    def _sizes(self, graph: Graph) -> list[dict[str, int]]:
        known = {n: self.dims[n] for n in dim_names(graph) if n in self.dims}
        tried = [{**default_dims(graph), **known}]
        for size in (0, 1):
            sizes = {**default_dims(graph, size=size), **known}
            if sizes not in tried:
                tried.append(sizes)
        return tried

    def _results(
        self, step: Step, sizes: dict[str, int]
    ) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
        arguments = random_inputs(step.before, sizes, seed=self.seed, float64=True)
        added = random_inputs(step.after, sizes, seed=self.seed, float64=True)[len(arguments) :]
        got = run(step.after, [*arguments, *added], float64=True, dims=sizes)
        if added:
            return reference_gradients(step, arguments, added, sizes), got
        return run(step.before, arguments, float64=True, dims=sizes), got

    def _message(self, step: Step, value: Value, problem: str, sizes: Mapping[str, int]) -> str:
        where = ", ".join(f"{n}={s}" for n, s in sizes.items()) or "no symbolic dims"
        return (
            f"pass {step.call} changed the meaning of @{step.after.name}: %{value.hint} {problem}"
            f"\n  at {where}, seed {self.seed}, in float64"
        )


def reference_gradients(
    step: Step,
    arguments: Sequence[torch.Tensor],
    cotangents: Sequence[torch.Tensor],
    sizes: Mapping[str, int],
) -> list[torch.Tensor]:
    """Outputs, then the gradients that the pass added, by autograd through the interpreter."""
    leaves = [a.requires_grad_() if a.is_floating_point() else a for a in arguments]
    outputs = run(step.before, leaves, float64=True, dims=sizes)
    pairs = zip(outputs, (v.type.is_float for v in step.before.outputs), strict=True)
    floats = [o for o, is_float in pairs if is_float]
    loss = sum((o * c).sum() for o, c in zip(floats, cotangents, strict=True))
    wanted = [a for a, g in zip(leaves, step.after.gradients, strict=True) if g is not None]
    if not isinstance(loss, torch.Tensor) or not loss.requires_grad:
        return [*outputs, *map(torch.zeros_like, wanted)]
    found = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
    return [o.detach() for o in outputs] + list(found)


def difference(expected: torch.Tensor, got: torch.Tensor) -> str:
    """What differs, in words; nothing if the two agree (NaN with NaN too)."""
    if expected.shape != got.shape:
        return f"has shape {tuple(got.shape)}, not {tuple(expected.shape)}"
    if not expected.is_floating_point():
        count = int((expected != got).sum())
        return f"differs in {count} of {got.numel()} elements" if count else ""
    finite = expected[expected.isfinite()].abs()
    scale = max(1.0, float(finite.max())) if finite.numel() else 1.0
    limit = _TOLERANCE * scale
    if torch.allclose(got.detach(), expected.detach(), rtol=0.0, atol=limit, equal_nan=True):
        return ""
    return f"differs by {float((got - expected).abs().max()):.3g} (largest element {scale:.3g})"
