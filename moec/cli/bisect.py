"""``moec bisect``: which pass, which rewrite, which kernel."""

from __future__ import annotations

import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer

from moec import bisect as search
from moec.cli.console import graphs_in, read_text, working
from moec.cli.graphs import File, Name, Passes, Target, Training, read_sizes
from moec.errors import PassError
from moec.inputs import default_dims, random_inputs
from moec.ir import Graph, show
from moec.ir.graph import Op, Value
from moec.manager import PassCall, parse_pipeline
from moec.pipeline import pipeline as default_pipeline
from moec.reproducer import pipeline_of

# Relative to the largest element; by the coarsest float among the graph's values.
_TOLERANCES = {"f64": 1e-9, "f32": 1e-4, "f16": 2e-2, "bf16": 5e-2}


def bisect(
    file: File,
    dims: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="T=33 ...", help="Sizes of dims; small ones if absent.", show_default=False
        ),
    ] = None,
    passes: Passes = None,
    target: Annotated[Target, typer.Option(help="Whose pipeline and kernels.")] = Target.aten,
    training: Training = False,
    graph: Name = None,
    seed: Annotated[int, typer.Option(help="Of the generated inputs.")] = 0,
    command: Annotated[
        str | None,
        typer.Option(
            "--cmd",
            metavar="COMMAND",
            help="Search for the first pass after which this command fails, in place of the"
            " interpreter's verdict; {} stands for a file with the IR.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Find the pass, the rewrite and the kernel that make a graph wrong.

    Every pass's result is interpreted in float64 and compared with what it was given. The rewrites
    of the first guilty pass are searched by halves; the one to blame is printed with the ops that
    it took away and put in place. If all passes are right, each emitted kernel is compared with
    its body. Exit code 0: nothing is wrong; 1: found.

    \b
    Examples:
      moec bisect a.moe
      moec bisect a.moe T=33 --training --target triton
      moec bisect a.moe --cmd "python check.py {}"
    """
    text = read_text(file)
    named = passes if passes is not None else pipeline_of(text)
    calls = parse_pipeline(default_pipeline(target.value, training) if named is None else named)
    sizes = read_sizes(dims or [])
    found = [
        _one(one, calls, target.value, sizes, seed, command) for one in graphs_in(text, file, graph)
    ]
    if any(found):
        raise typer.Exit(1)


def _one(
    graph: Graph,
    calls: Sequence[PassCall],
    target: str,
    sizes: dict[str, int],
    seed: int,
    command: str | None,
) -> bool:
    """Search one graph and print what was found; whether anything was."""
    test = search.same_meaning(sizes, seed) if command is None else _command_test(command, graph)
    with working(f"@{graph.name}: {len(calls)} passes"):
        guilty, last = search.find_pass(graph, calls, test)
    if guilty is not None:
        typer.echo("\n".join(_pass_lines(graph, guilty, len(calls))))
        return True
    if command is not None:
        typer.echo(f"@{graph.name}: the command succeeds after every one of {len(calls)} passes")
        return False
    return _kernels(last, target, sizes, seed, len(calls))


def _command_test(command: str, graph: Graph) -> search.StepTest:
    problem = command_problem(command, graph)
    if problem:
        raise PassError(f"the command fails on @{graph.name} before any pass: {problem}")
    return lambda step: command_problem(command, step.after) if step.changed else ""


def command_problem(command: str, graph: Graph) -> str:
    """What is wrong if a command fails on a graph's file; nothing if it succeeds."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{graph.name}.moe"
        path.write_text(show(graph), encoding="utf-8")
        words = [word.replace("{}", str(path)) for word in shlex.split(command)]
        if "{}" not in command:
            words.append(str(path))
        status = subprocess.run(words, capture_output=True, check=False).returncode
    return f"{words[0]} exits with status {status}" if status else ""


def _pass_lines(graph: Graph, guilty: search.GuiltyPass, count: int) -> list[str]:
    lines = [
        f"@{graph.name}: pass {guilty.index + 1} of {count} is wrong: {guilty.call}",
        f"  {guilty.problem}",
    ]
    rewrite = guilty.rewrite
    if rewrite is None:
        return [*lines, "  the pass is wrong as a whole: no single rewrite makes the difference"]
    lines.append(f"  rewrite {rewrite.number} of {rewrite.total}: {rewrite.what}")
    lines += [f"  - {_op_line(op)}" for op in rewrite.removed]
    lines += [f"  + {_op_line(op)}" for op in rewrite.added]
    return lines


def _op_line(op: Op) -> str:
    attrs = ", ".join(f"{k}={v}" for k, v in op.attrs.items())
    types = ", ".join(str(v.type) for v in op.results)
    where = f"  // {op.loc}" if op.loc is not None else ""
    return f"{op!r}{f' {{{attrs}}}' if attrs else ''} : {types}{where}"


def _kernels(graph: Graph, target: str, sizes: dict[str, int], seed: int, count: int) -> bool:
    dims = {**default_dims(graph), **sizes}
    arguments = random_inputs(graph, dims, seed=seed)
    if target == "triton":
        arguments = _on_triton(arguments)
    tolerance = max(_TOLERANCES.get(v.type.dtype, 0.0) for v in _floats(graph))
    with working(f"@{graph.name}: the emitted module"):
        problem = search.emitted_problem(graph, target, arguments, tolerance)
        guilty = search.find_kernels(graph, target, arguments, tolerance) if problem else []
    if not problem:
        typer.echo(f"@{graph.name}: {count} passes and the {target} module are right")
        return False
    typer.echo(f"@{graph.name}: the passes are right, the {target} module is not: {problem}")
    for kernel in guilty:
        typer.echo(f"  kernel {_op_line(kernel.op)}\n    {kernel.problem}")
    if not guilty:
        typer.echo("  no kernel is wrong alone: look at the host part (moec emit prints it)")
    return True


def _floats(graph: Graph) -> list[Value]:
    return [v for op in graph.ops for v in op.results if v.type.is_float]


def _on_triton(arguments: list[torch.Tensor]) -> list[torch.Tensor]:
    """The arguments where Triton kernels run: on the GPU, or here under its interpreter."""
    import triton

    if torch.cuda.is_available():
        return [a.cuda() for a in arguments]
    if not triton.knobs.runtime.interpret:
        raise PassError(
            "no GPU here to run Triton kernels on; set TRITON_INTERPRET=1 to run them in Triton's "
            "interpreter, or bisect with --target aten"
        )
    return arguments
