"""What is asked of a graph: every way in which the compiler could be wrong about it.

Each *question* gives what is wrong in words, or nothing. The interpreter in float64 is the meaning;
gradients are compared with PyTorch's own differentiation through it.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from moec import interp
from moec.bisect import relative_error
from moec.errors import MoecError, PassError
from moec.execute import run_emitted
from moec.ir import Graph, parse, show, verify
from moec.manager import PassCall, PassManager, Step, all_passes
from moec.observers import Check, Observer, Verify, difference, reference_gradients
from moec.pipeline import CLEAN, FUSE, GRAD, GRAD_EXACT, KEEP, RAISE
from moec.routings import adversarial_inputs

# Passes whose result they leave as it is when they run again.
_ONCE = {"grad"}
# float32 sums in another order differ by less; relative to the largest element
_ROUNDING = {"f64": 1e-9, "f32": 2e-4}


@dataclass(frozen=True)
class Failure:
    """What is wrong: the question, the graph and pipeline that show it, and the words."""

    question: str
    graph: Graph
    passes: str
    problem: str

    def __str__(self) -> str:
        return f"{self.question}, {self.passes or 'no pass'}: {self.problem}"


class Readable(Observer):
    """Raise where a pass's result does not read back as itself."""

    def after(self, step: Step, index: int) -> None:
        if step.changed and parse(show(step.after)) != step.after:
            raise PassError(f"pass {step.call}: the graph's text reads back as another graph")


class Settled(Observer):
    """Raise where a pass changes its own result."""

    def after(self, step: Step, index: int) -> None:
        call = step.call
        if not step.changed or call.definition.name in _ONCE:
            return
        again = call.definition.run(step.after, **call.options)
        if again != step.after:
            raise PassError(f"pass {call}: not idempotent; a second run changes the graph again")


@dataclass(frozen=True)
class Stage:
    """Some passes, the target whose code may be emitted after them, and what may come next."""

    passes: str
    target: str = ""
    then: tuple[Stage, ...] = ()


def stages() -> tuple[Stage, ...]:
    """All pipelines as trees: what two of them share is run once."""
    lowered = f"{FUSE}, lower{{descriptors=true}}"
    kept = Stage(
        f"{GRAD}, {KEEP}",
        then=(Stage(f"{FUSE}, lower", "triton"), Stage("fuse-rows, dce", "aten")),
    )
    exact = f"{CLEAN}, {GRAD_EXACT}, {KEEP}, fuse-rows, dce"
    return (Stage(RAISE, "aten", (kept, Stage(lowered, "triton"))), Stage(exact, "aten"))


def text_problem(graph: Graph) -> str:
    """Whether the graph is valid and its text reads back."""
    try:
        verify(graph)
        return "" if parse(show(graph)) == graph else "the text reads back as another graph"
    except MoecError as error:
        return str(error)


def pass_problem(
    graph: Graph,
    passes: str | Sequence[PassCall],
    seed: int,
    more: Sequence[Observer] = (),
) -> str:
    """What a pipeline does wrong: each pass's rules, meaning, and that it settles."""
    try:
        PassManager(passes, [Verify(), Check(seed=seed), Settled(), *more]).run(graph)
    except MoecError as error:
        return str(error)
    except Exception as error:  # a pass that raises anything else is wrong, whatever it is
        return _crash(error)
    return ""


def meaning_problem(graph: Graph, after: Graph, seed: int) -> str:
    """Whether a pipeline's result computes the same, on routings made to be awkward."""
    for name, sizes, arguments in adversarial_inputs(graph, seed):
        count = len(after.cotangents)
        generator = torch.Generator().manual_seed(seed)
        outputs = interp.run(graph, arguments, float64=True, dims=sizes)
        floats = [o for o in outputs if o.is_floating_point()]
        added = [
            torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in floats[:count]
        ]
        got = interp.run(after, [*arguments, *added], float64=True, dims=sizes)
        expected: Sequence[torch.Tensor] = outputs
        if added:
            step = Step(PassCall(all_passes()["grad"]), graph, after, 0.0, 0)
            expected = reference_gradients(step, arguments, added, sizes)
        for value, a, b in zip(after.returned, expected, got, strict=True):
            problem = difference(a, b)
            if problem:
                return f"%{value.hint} {problem}, routing {name}, {sizes}"
    return ""


def emitted_problem(graph: Graph, target: str, seed: int) -> str:
    """Whether the emitted module computes what the lowered graph means, at awkward routings.

    Half precision is left out: which expert wins a near tie depends on rounding there.
    """
    floats = {v.type.dtype for op in graph.ops for v in op.results if v.type.is_float}
    floats |= {v.type.dtype for v in (*graph.inputs, *graph.cotangents) if v.type.is_float}
    if not floats or not floats <= _ROUNDING.keys():
        return ""
    limit = max(_ROUNDING[d] for d in floats)
    for name, sizes, arguments in adversarial_inputs(graph, seed, float64=False):
        expected = interp.run(graph, arguments, float64=True, dims=sizes)
        rounded = interp.run(graph, arguments, dims=sizes)
        pairs = zip(rounded, expected, strict=True)
        if not all(relative_error(r, e) <= limit / 4 for r, e in pairs):
            continue  # rounding alone changes the result: a tie, or a steep function
        try:
            found = run_emitted(graph, target, arguments)
        except Exception as error:  # emitter, kernel compiler and launch raise errors of many kinds
            return _crash(error)
        for value, e, f in zip(graph.returned, expected, found, strict=True):
            if f.shape != e.shape or not relative_error(f, e) <= limit:
                return (
                    f"%{value.hint} is off by {relative_error(f, e):.2g}, routing {name}, {sizes}"
                )
    return ""


def _crash(error: Exception) -> str:
    """An error of any kind, with the innermost frame."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    words = str(error).splitlines() or [""]
    place = f"{os.path.basename(frame.filename)}:{frame.lineno}"
    return f"raises {type(error).__name__} at {place}: {words[0]}"


def failures(graph: Graph, seed: int, targets: Sequence[str] = ("aten",)) -> Iterator[Failure]:
    """Everything that is wrong with how the compiler takes a graph."""
    problem = text_problem(graph)
    if problem:
        yield Failure("text", graph, "", problem)
        return
    for stage in stages():
        yield from _failures_from(stage, graph, graph, "", seed, targets)


def _failures_from(
    stage: Stage, graph: Graph, first: Graph, so_far: str, seed: int, targets: Sequence[str]
) -> Iterator[Failure]:
    """``graph`` is ``first`` after the passes ``so_far``."""
    problem = pass_problem(graph, stage.passes, seed)
    if problem:
        yield Failure("passes", graph, stage.passes, problem)
        return
    after = PassManager(stage.passes).run(graph)
    problem = text_problem(after) or meaning_problem(first, after, seed)
    if problem:
        yield Failure("meaning", first, so_far + stage.passes, problem)
    if stage.target in targets:
        problem = emitted_problem(after, stage.target, seed)
        if problem:
            yield Failure(f"emitted for {stage.target}", after, "", problem)
    for following in stage.then:
        passes = f"{so_far}{stage.passes}, "
        yield from _failures_from(following, after, first, passes, seed, targets)


def pass_failures(graph: Graph, seed: int) -> Iterator[Failure]:
    """Everything that one of moec's passes does wrong with a graph, at two stages."""
    for before in graphs_on_the_way(graph):
        for name, definition in all_passes().items():
            if not definition.is_own or (name == "grad" and before.cotangents):
                continue
            problem = pass_problem(before, [PassCall(definition)], seed, [Readable()])
            if problem:
                yield Failure("pass alone", before, name, problem)


def graphs_on_the_way(graph: Graph) -> Iterator[Graph]:
    """The graph as captured, and raised, differentiated and ready for fusion."""
    yield graph
    try:
        yield PassManager(f"{RAISE}, {GRAD}, {KEEP}").run(graph)
    except MoecError:
        return  # the whole pipeline's question says so


__all__ = [
    "Failure",
    "emitted_problem",
    "failures",
    "graphs_on_the_way",
    "meaning_problem",
    "pass_failures",
    "pass_problem",
    "text_problem",
]
