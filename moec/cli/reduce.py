"""``moec reduce``: a small file that fails as a large one does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from moec import bisect as search
from moec.cli.console import calls_for, graphs_in, read_text, say, working, write_result
from moec.cli.graphs import File, Name, Output, Passes, Target, Training
from moec.command import command_problem
from moec.errors import PassError
from moec.ir import Graph, show
from moec.manager import PassCall
from moec.pipeline import pipeline as default_pipeline
from moec.reduce import reduce as smallest
from moec.reduce import source_of_test


def reduce(
    file: File,
    output: Output = None,
    passes: Passes = None,
    target: Annotated[Target, typer.Option(help="Whose default pipeline.")] = Target.triton,
    training: Training = False,
    graph: Name = None,
    command: Annotated[
        str | None,
        typer.Option(
            "--cmd",
            metavar="COMMAND",
            help="The failure is that this command fails; {} stands for a file with the IR.",
            show_default=False,
        ),
    ] = None,
    test: Annotated[
        Path | None,
        typer.Option(
            "--test",
            metavar="FILE",
            help="Also write a test that fails as long as the pass is wrong.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Shrink a graph while its failure stays.

    The first pass that raises or changes the meaning of the graph is searched; then ops, results
    and sizes are dropped as long as that pass goes on failing in the same way. The result has a
    run line, so that moec opt --check-each and moec bisect repeat the failure.

    \b
    Examples:
      moec reduce moec-repro-1a2b3c4d.moe -o small.moe
      moec reduce a.moe -p "cse, fuse-gemm" --test tests/test_small.py
      moec reduce a.moe --cmd "python check.py {}"
    """
    text = read_text(file)
    found = graphs_in(text, file, graph)
    if command is not None:
        (start, fails), call = _command_failure(found, command), None
    else:
        calls = calls_for(passes, text, file, default_pipeline(target.value, training))
        start, fails, call = _pass_failure(found, calls)
    with working(f"reducing @{start.name}: {len(start.ops)} ops"):
        small = smallest(start, fails)
    say(f"@{start.name}: {len(start.ops)} -> {len(small.ops)} ops")
    run = f"// run: {call}\n" if call is not None else ""
    write_result(run + show(small), output)
    if test is not None and call is not None:
        words = f"{call} on a reduced graph."
        write_result(source_of_test(small, str(call), show(small), words), test)


def _pass_failure(
    graphs: list[Graph], calls: Sequence[PassCall]
) -> tuple[Graph, Callable[[Graph], bool], PassCall]:
    """The graph before the first guilty pass, whether a graph makes it fail alike, and the pass."""
    same = search.same_meaning()
    for one in graphs:
        guilty, _ = search.find_pass(one, calls, same)
        if guilty is not None:
            break
    else:
        shown = ", ".join(map(str, calls))
        raise PassError(f"nothing fails: every graph is right after every pass of {shown}")
    call, kind = guilty.call, search.kind_of(guilty.problem)

    def fails(graph: Graph) -> bool:
        _, problem = search.attempt(call, graph, None, same)
        return bool(problem) and search.kind_of(problem) == kind

    say(f"@{guilty.before.name}: {guilty.call}: {guilty.problem.splitlines()[0]}")
    return guilty.before, fails, call


def _command_failure(graphs: list[Graph], command: str) -> tuple[Graph, Callable[[Graph], bool]]:
    for one in graphs:
        if command_problem(command, one):
            return one, lambda graph: bool(command_problem(command, graph))
    raise PassError("nothing fails: the command succeeds on every graph of the file")
