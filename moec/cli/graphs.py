"""``moec opt``, ``moec run`` and ``moec emit``: work on IR files."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer

from moec import interp
from moec.cli.console import (
    calls_for,
    graphs_in,
    progress,
    read_graphs,
    read_text,
    say,
    write_result,
)
from moec.errors import CodegenError, DimError, PassError
from moec.execute import try_emitted
from moec.files import folder_inside
from moec.inputs import check_dims, dim_names, random_inputs
from moec.ir import Graph, Value, show
from moec.ir.graph import walk
from moec.logs import LogPasses
from moec.manager import Observer as ObserverProtocol
from moec.manager import PassCall, PassManager, Step, find_pass, parse_pipeline
from moec.observers import (
    Check,
    Dump,
    Observer,
    Print,
    PrintBefore,
    Stats,
    Time,
    TracePasses,
    Verify,
)
from moec.pipeline import pipeline as default_pipeline
from moec.reproducer import Emission, Reproducer, check_of, emission_of
from moec.torch_trace import TorchTrace
from moec.trace_events import TraceEvents, recording


class Target(StrEnum):
    """What code is generated for."""

    triton = "triton"
    aten = "aten"


File = Annotated[
    Path,
    typer.Argument(metavar="FILE", help="A file of IR text; - is stdin.", show_default=False),
]
Output = Annotated[
    Path | None,
    typer.Option("-o", "--output", help="The file to write; stdout if absent.", show_default=False),
]
Name = Annotated[
    str | None,
    typer.Option(
        "--graph", metavar="NAME", help="Only this graph of the file.", show_default=False
    ),
]
Passes = Annotated[
    str | None,
    typer.Option(
        "-p",
        "--passes",
        metavar="PASSES",
        help='The passes: "cse, fuse-gemm{max-ops=16}"; moec passes lists them. Absent: the'
        ' file\'s "// run:" line, or else the default pipeline for --target and --training.',
        show_default=False,
    ),
]
Training = Annotated[
    bool, typer.Option("--training", help="Default pipeline: with the backward pass.")
]


def opt(
    file: File,
    passes: Passes = None,
    output: Output = None,
    target: Annotated[
        Target, typer.Option(help="The target whose default pipeline runs.")
    ] = Target.triton,
    training: Training = False,
    graph: Name = None,
    print_before: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PASS|all", help="Print the IR before this pass, on stderr.", show_default=False
        ),
    ] = None,
    print_after: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PASS|all", help="Print the IR after this pass, on stderr.", show_default=False
        ),
    ] = None,
    stop_after: Annotated[
        str | None,
        typer.Option(
            metavar="PASS|NUMBER",
            help="Run no pass after this one: its first run, or its number in a dump.",
            show_default=False,
        ),
    ] = None,
    dump: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Write DIR/07-fuse-gemm.moe and so on: the IR after each pass that changed it.",
            show_default=False,
        ),
    ] = None,
    time: Annotated[bool, typer.Option("--time", help="Print the time of each pass.")] = False,
    stats: Annotated[
        bool, typer.Option("--stats", help="Print the rewrites of each pass.")
    ] = False,
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write the time of each pass as Chrome-trace JSON, for Perfetto.",
            show_default=False,
        ),
    ] = None,
    check_each: Annotated[
        bool,
        typer.Option("--check-each", help="Interpret before and after each pass, and compare."),
    ] = False,
    verify: Annotated[bool, typer.Option(help="Check the IR's rules after each pass.")] = True,
) -> None:
    """Run passes over IR text.

    If a pass, the verifier or a check fails, a reproducer moec-repro-<hash>.moe is written into the
    current folder; moec opt on that file fails in the same way.

    \b
    Examples:
      moec opt a.moe -o b.moe
      moec opt a.moe -p "cse, dce" --print-after cse
      moec opt a.moe --training --dump steps --time --stats
      moec opt a.moe --print-before fuse-gemm --stop-after fuse-gemm > b.moe
      moec opt a.moe --check-each > b.moe
    """
    text = read_text(file)
    found = graphs_in(text, file, graph)
    calls = calls_for(passes, text, file, default_pipeline(target.value, training))
    calls = _until(calls, stop_after)
    before = _printed("--print-before", print_before, calls)
    after = _printed("--print-after", print_after, calls)
    check = _check(text, file, check_each, passes is None)
    reports: list[Observer] = [*([Time()] if time else []), *([Stats()] if stats else [])]
    events = TraceEvents()

    def observers(one: Graph) -> list[Observer]:
        watching: list[Observer] = [Verify()] if verify else []
        watching += [PrintBefore(before, say)] if print_before else []
        watching += [Print(after, say)] if print_after else []
        if dump:
            watching.append(Dump(folder_inside(dump, one.name) if len(found) > 1 else dump))
        watching += [*check, *reports, LogPasses(f"@{one.name}"), TorchTrace(one.name)]
        return [*watching, TracePasses()]

    with recording(events, trace) if trace else contextlib.nullcontext():
        results = run_passes(found, calls, observers)
    write_result(show(results), output)
    for report in reports:
        say(str(report))


def _until(calls: list[PassCall], stop_after: str | None) -> list[PassCall]:
    """The passes up to one that is named, or numbered as in a dump."""
    if stop_after is None:
        return calls
    if stop_after.isdecimal():
        if int(stop_after) > len(calls):
            raise PassError(f"--stop-after {stop_after}: this pipeline has {len(calls)} passes")
        return calls[: int(stop_after)]
    require_pass("--stop-after", stop_after, calls)
    names = [call.definition.name for call in calls]
    return calls[: names.index(stop_after) + 1]


def _check(text: str, file: Path, each: bool, replays: bool) -> list[Observer]:
    """The check that was asked for: by a reproducer (its sizes and seed), or by the option."""
    asked = check_of(text, str(file)) if replays else None
    if asked is not None:
        return [Check(*asked)]
    return [Check()] if each else []


def _printed(option: str, asked: list[str] | None, calls: Sequence[PassCall]) -> set[str] | None:
    """The passes to print; ``None`` for all."""
    if not asked or "all" in asked:
        return None
    for name in asked:
        require_pass(option, name, calls)
    return set(asked)


def require_pass(option: str, name: str, calls: Sequence[PassCall]) -> None:
    """Raise :class:`PassError` unless a pipeline runs the pass."""
    if find_pass(name).name not in {call.definition.name for call in calls}:
        raise PassError(f"{option} {name}: this pipeline does not run it; it runs {_shown(calls)}")


def _shown(calls: Sequence[PassCall]) -> str:
    return ", ".join(map(str, calls)) or "nothing"


class _Steps(Observer):
    """Moves a progress bar."""

    def __init__(self, step: Callable[[str], None]) -> None:
        self.step = step

    def after(self, step: Step, index: int) -> None:
        self.step(step.call.definition.name)


def run_passes(
    graphs: Sequence[Graph],
    calls: Sequence[PassCall],
    observers: Callable[[Graph], Sequence[ObserverProtocol]],
) -> list[Graph]:
    """Every graph after the passes; a pass that fails leaves a reproducer in the current folder."""
    results = []
    with progress("passes", len(graphs) * len(calls)) as step:
        for one in graphs:
            reproducer = Reproducer()
            watching = [*observers(one), reproducer, _Steps(step)]
            with reproducer:
                results.append(PassManager(calls, watching).run(one))
    return results


def run(
    file: File,
    dims: Annotated[
        list[str] | None,
        typer.Argument(metavar="T=33 ...", help="Sizes of the graph's dims.", show_default=False),
    ] = None,
    graph: Name = None,
    seed: Annotated[int, typer.Option(help="Of the generated inputs.")] = 0,
    float64: Annotated[
        bool, typer.Option("--float64", help="Compute every float in float64: the reference.")
    ] = False,
) -> None:
    """Interpret graphs on generated inputs.

    Prints shape, norm and checksum of every result. The same seed gives the same inputs, before
    and after optimisation, so two runs can be compared.

    \b
    Examples:
      moec run a.moe T=33
      moec run a.moe T=0 --float64 --graph mlp
    """
    sizes = read_sizes(dims or [])
    found = read_graphs(file, graph)
    unknown = sizes.keys() - {n for g in found for n in dim_names(g)}
    if unknown:
        known = ", ".join(dict.fromkeys(n for g in found for n in dim_names(g))) or "none"
        raise DimError(f"{file} has no dim {', '.join(sorted(unknown))}; its dims: {known}")
    for one in found:
        check_dims(one, sizes)  # all of them, before the first result is printed
    for one in found:
        inputs = random_inputs(one, sizes, seed=seed, float64=float64)
        with torch.no_grad():
            results = interp.run(one, inputs, float64=float64, dims=sizes)
        typer.echo("\n".join([f"@{one.name}", *result_lines(one, results)]))


def read_sizes(words: Sequence[str]) -> dict[str, int]:
    """``["T=33"]`` as a mapping; anything else is wrong usage."""
    sizes: dict[str, int] = {}
    for word in words:
        name, _, number = word.partition("=")
        if not number.isdecimal() or not name.isidentifier() or len(number) > 18:
            raise typer.BadParameter(f"{word!r} is no size; write a dim and a number, as in T=33")
        sizes[name] = int(number)
    return sizes


def result_lines(graph: Graph, results: Sequence[torch.Tensor]) -> list[str]:
    """One line a result; a gradient is called after its input."""
    named = [(v.hint, v) for v in graph.outputs]
    pairs = zip(graph.inputs, graph.gradients, strict=False)
    named += [(f"grad {v.hint}", g) for v, g in pairs if g is not None]
    width = max((len(n) for n, _ in named), default=0)
    rows = zip(named, results, strict=True)
    return [f"  {name.ljust(width)}  {_described(value, t)}" for (name, value), t in rows]


def _described(value: Value, tensor: torch.Tensor) -> str:
    norm = float(tensor.double().norm())
    flat = tensor.contiguous()
    # The bytes themselves: NumPy, which has the usual way to them, is no dependency.
    data = ctypes.string_at(flat.data_ptr(), flat.nbytes) if flat.nbytes else b""
    checksum = hashlib.sha256(data).hexdigest()[:12]
    return f"{value.type}  shape {tuple(tensor.shape)}  norm {norm:.6g}  checksum {checksum}"


def emit(
    file: File,
    output: Output = None,
    target: Annotated[
        Target | None,
        typer.Option(help="What to generate: triton, unless the file says so.", show_default=False),
    ] = None,
    training: Annotated[
        bool, typer.Option("--training", help="Differentiate first, if the graph is no joint one.")
    ] = False,
    graph: Name = None,
    as_it_is: Annotated[bool, typer.Option("--as-it-is", help="Run no passes first.")] = False,
    trial: Annotated[
        bool,
        typer.Option("--try", help="Then run it once, on one token: its kernels compile here."),
    ] = False,
) -> None:
    """Write the Python module that runs a graph.

    It holds the kernels and a run function. A graph without kernels is optimised first, by the
    default pipeline of the target. If the emitter or, with --try, a kernel's compiler fails, a
    reproducer moec-repro-<hash>.moe is written into the current folder; its "// emit:" line says
    what moec emit does with it.

    \b
    Examples:
      moec emit a.moe -o kernels.py
      moec emit a.moe --target aten --graph mlp
      moec emit a.moe --try -o kernels.py
    """
    text = read_text(file)
    found = graphs_in(text, file, graph)
    if len(found) > 1:
        names = ", ".join(g.name for g in found)
        raise CodegenError(f"{file} holds {len(found)} graphs; choose one with --graph: {names}")
    asked = emission_of(text, str(file)) or Emission((target or Target.triton).value)
    asked = Emission(target.value if target else asked.target, asked.trial or trial)
    lowered = as_it_is or emission_of(text, str(file)) or _has_kernels(found[0])
    calls = parse_pipeline("" if lowered else default_pipeline(asked.target, training))
    (result,) = run_passes(found, calls, lambda one: [Verify()])
    write_result(emitted(result, asked), output)


def _has_kernels(graph: Graph) -> bool:
    return any(op.kind.startswith("kern.") for op in walk(graph))


def emitted(graph: Graph, asked: Emission) -> str:
    """The module of a lowered graph, tried if asked for; a failure leaves a reproducer."""
    from moec.codegen import emit_module

    reproducer = Reproducer()
    with reproducer:
        reproducer.emits(graph, Emission(asked.target))
        source = emit_module(graph, asked.target)
        if asked.trial:
            reproducer.emits(graph, asked)
            try_emitted(graph, asked.target)
    return source
