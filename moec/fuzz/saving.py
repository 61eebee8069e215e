"""Failures become tests: a reduced graph in a file, and the question to ask of it again."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from moec.bisect import kind_of
from moec.errors import MoecError
from moec.fuzz.net import Failure, emitted_problem, meaning_problem, pass_problem, text_problem
from moec.ir import Graph, parse, show
from moec.manager import PassManager
from moec.reduce import reduce
from moec.reproducer import pipeline_of, versions

_QUESTION = re.compile(r"^// question: (?P<question>.+)$", re.MULTILINE)
_SEED = re.compile(r"^// seed: (?P<seed>\d+)$", re.MULTILINE)


def problem_with(graph: Graph, question: str, passes: str, seed: int) -> str:
    """What is wrong with a graph as far as one question goes."""
    if question == "text":
        return text_problem(graph)
    if question in ("passes", "pass alone"):
        return pass_problem(graph, passes, seed)
    if question == "meaning":
        return meaning_problem(graph, PassManager(passes).run(graph), seed)
    return emitted_problem(graph, question.split()[-1], seed)


def reduced(failure: Failure, seed: int, progress: Callable[[Graph], object] = id) -> Failure:
    """The failure on a smaller graph."""
    kind = kind_of(failure.problem)

    def fails(graph: Graph) -> bool:
        try:
            problem = problem_with(graph, failure.question, failure.passes, seed)
        except (MoecError, RuntimeError):
            return False  # the question cannot be asked of this graph: it lost a size, say
        return bool(problem) and kind_of(problem) == kind

    graph = reduce(failure.graph, fails, progress) if fails(failure.graph) else failure.graph
    problem = problem_with(graph, failure.question, failure.passes, seed)
    return Failure(failure.question, graph, failure.passes, problem or failure.problem)


def save(failure: Failure, seed: int, folder: Path) -> Path:
    """Write a failure as a file that :func:`problem_of_file` asks again.

    Raises:
        OSError: the file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    words = [f"//   {line}".rstrip() for line in failure.problem.splitlines()]
    header = [f"// run: {failure.passes}"] if failure.passes else []
    header += [f"// question: {failure.question}", f"// seed: {seed}", f"// {versions()}", *words]
    name = re.sub(r"[^a-z0-9]+", "-", failure.question.lower())
    path = folder / f"{name}-{failure.graph.fingerprint[:8]}.moe"
    path.write_text("\n".join([*header, show(failure.graph)]), encoding="utf-8")
    return path


def problem_of_file(path: Path) -> str:
    """What is wrong with a saved failure today; nothing once it is mended."""
    text = path.read_text(encoding="utf-8")
    question, seed = _QUESTION.search(text), _SEED.search(text)
    if question is None or seed is None:
        return f"{path.name} has no lines // question: and // seed:"
    graph = parse(text, path.name)
    passes = pipeline_of(text) or ""
    return problem_with(graph, question["question"].strip(), passes, int(seed["seed"]))


__all__ = ["problem_of_file", "problem_with", "reduced", "save"]
