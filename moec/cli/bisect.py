"""``moec bisect``: which pass, which rewrite, which kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer

from moec import bisect as search
from moec.cli.bisect_time import Baseline, Rounds, time_graphs, time_model
from moec.cli.console import calls_for, graphs_in, read_text, say, working
from moec.cli.graphs import Name, Passes, Target, Training, read_sizes
from moec.command import command_test
from moec.errors import PassError
from moec.execute import on_device_of
from moec.inputs import default_dims, random_inputs
from moec.ir import Graph
from moec.manager import PassCall
from moec.pipeline import pipeline as default_pipeline
from moec.targets import has_descriptors
from moec.verdict import Verdict, judge

# A configuration with more bytes of weights is tested on a small model of its structure: the
# reference is in float64, and sizes beyond a few tiles find no more.
LARGEST = 1 << 29
# More tokens than fit into a small tile
MANY = 33


class Metric(StrEnum):
    """What is searched for."""

    meaning = "meaning"
    time = "time"


Subject = Annotated[
    str,
    typer.Argument(
        metavar="FILE|MODEL",
        help="A file of IR text (.moe; - is stdin), or a model as moec explain takes it.",
        show_default=False,
    ),
]


def bisect(
    subject: Subject,
    dims: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="T=33 ...",
            help="Sizes of dims; small ones if absent (for time: 1024).",
            show_default=False,
        ),
    ] = None,
    metric: Annotated[
        Metric, typer.Option(help="meaning: what is wrong; time: what is slow.")
    ] = Metric.meaning,
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
            " interpreter's verdict; {} stands for a file with the IR. Exit statuses as for git"
            " bisect run: 0 good, 125 cannot be tested, others to 127 bad.",
            show_default=False,
        ),
    ] = None,
    baseline: Baseline = None,
    rounds: Rounds = None,
) -> None:
    """Find the pass, the rewrite and the kernel that make a graph or a model wrong or slow.

    Every pass's result is interpreted in float64 and compared with what it was given. The rewrites
    of the first guilty pass are searched by halves; the one to blame is printed with the ops that
    it took away and put in place. If all passes are right, each emitted kernel is compared with
    its body. For a model, the captured IR is compared with the module first.

    With --metric time the emitted module is timed, op by op and after each pass; a pass is named
    if it makes the module slower beyond the noise of the measurement, a kernel if it is slower
    than its body. --baseline compares with another pipeline, or with a file of optimised IR.

    Exit code 0: nothing found; 1: found.

    \b
    Examples:
      moec bisect a.moe
      moec bisect mixtral --training
      moec bisect a.moe --cmd "python check.py {}"
      moec bisect a.moe T=4096 --training --metric time
      moec bisect a.moe --metric time --baseline before.moe
    """
    if metric is Metric.meaning and (baseline is not None or rounds is not None):
        raise typer.BadParameter("--baseline and --rounds are for --metric time")
    if metric is Metric.time and command is not None:
        raise typer.BadParameter("--cmd decides by itself; leave out --metric time")
    sizes = read_sizes(dims or [])
    is_file = subject == "-" or subject.endswith(".moe")
    if metric is Metric.time:
        times = time_graphs if is_file else time_model
        found = times(subject, sizes, target, training, passes, graph, seed, baseline, rounds)
    elif is_file:
        text = read_text(Path(subject))
        calls = calls_for(passes, text, Path(subject), _default(target, training))
        graphs = graphs_in(text, Path(subject), graph)
        found = any([_graph(one, calls, target.value, sizes, seed, command) for one in graphs])
    else:
        found = _model(subject, dims, target, training, passes, seed, command, graph)
    if found:
        raise typer.Exit(1)


def _default(target: Target, training: bool) -> str:
    """The target's passes on this machine."""
    on_gpu = target is Target.triton and torch.cuda.is_available()
    descriptors = on_gpu and has_descriptors(torch.device("cuda"))
    return default_pipeline(target.value, training, descriptors)


def _graph(
    graph: Graph,
    calls: Sequence[PassCall],
    target: str,
    sizes: dict[str, int],
    seed: int,
    command: str | None,
) -> bool:
    """Search one graph and print what was found; whether anything was."""
    with working(f"@{graph.name}: {len(calls)} passes"):
        if command is None:
            test = search.same_meaning(sizes, seed)
            verdict = judge(graph, calls, target, test, _arguments(target, sizes, seed))
        else:
            guilty, last = search.find_pass(graph, calls, command_test(command, graph))
            verdict = Verdict(last, len(calls), target, guilty)
    if command is not None and not verdict.is_wrong:
        typer.echo(f"@{graph.name}: the command succeeds after every one of {len(calls)} passes")
    else:
        typer.echo(str(verdict))
    return verdict.is_wrong


def _arguments(
    target: str, sizes: dict[str, int], seed: int
) -> Callable[[Graph], list[list[torch.Tensor]]]:
    """Inputs at the sizes that are named; others are small and distinct, then one, then many."""

    def arguments(graph: Graph) -> list[list[torch.Tensor]]:
        found: list[dict[str, int]] = []
        for size in (None, 1, MANY):
            dims = {**default_dims(graph, size), **sizes}
            if dims not in found:
                found.append(dims)
        return [on_device_of(target, random_inputs(graph, d, seed=seed)) for d in found]

    return arguments


def _model(
    spec: str,
    dims: list[str] | None,
    target: Target,
    training: bool,
    passes: str | None,
    seed: int,
    command: str | None,
    graph: str | None,
) -> bool:
    if command is not None or graph is not None or dims:
        raise PassError(
            f"{spec}: --cmd, --graph and sizes are for a file of IR; write one with moec trace "
            f"{spec} -o a.moe"
        )
    from moec.model_bisect import bisect_model

    model = _loaded(spec)
    with working("looking for regions, then pass by pass"):
        found = bisect_model(
            model, target=target.value, training=training, passes=passes, seed=seed
        )
    typer.echo(str(found))
    return found.is_wrong


def _loaded(spec: str) -> torch.nn.Module:
    from moec.capture.model_spec import load, load_small

    with working(f"building {spec}"):
        loaded = load_small(spec)
        if loaded.whole is not None and sum(p.nbytes for p in loaded.whole.parameters()) <= LARGEST:
            loaded = load(spec)
    if loaded.note:
        say(f"{spec}: {loaded.note}")
    return loaded.model
