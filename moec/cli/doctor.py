"""``moec doctor``: what would be compiled of a model, what not, why, and what to do."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from moec.cli.console import print_table, say, working
from moec.errors import CompileError

if TYPE_CHECKING:
    from moec.doctor import Report, Structure

Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="A Hugging Face config.json or its folder, an architecture (mixtral,"
        " OlmoeForCausalLM); or module:factory, a function without arguments that returns an"
        " nn.Module.",
        show_default=False,
    ),
]


def doctor(
    model: Model = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    every: Annotated[
        bool, typer.Option("--list", help="Print the table of all architectures instead.")
    ] = False,
) -> None:
    """Say what would be compiled of a model, what not, why, and what to do.

    One entry for each structure of MoE block, with the number of such blocks. A checkpoint's
    configuration of any size will do: a small model of the same structure is built, and compared
    with the large one by the names, code and ranks of its blocks. Exit code 0: every MoE block, or
    the experts in it, is compiled for inference and training; 1: one stays as it was, or there is
    none; 2: wrong usage, or MODEL names nothing.

    \b
    Examples:
      moec doctor path/to/config.json
      moec doctor mixtral --json
      moec doctor --list
    """
    if every == (model is not None):
        raise typer.BadParameter("give either MODEL or --list")
    if model is None:
        _list(as_json)
        return
    report = _diagnosed(model)
    typer.echo(json.dumps(report.as_json(), indent=2) if as_json else text_of(report))
    raise typer.Exit(int(not report.is_well))


def _diagnosed(model: str) -> Report:
    from moec.capture.model_spec import load_small
    from moec.doctor import diagnose

    with working(f"building {model}"):
        try:
            loaded = load_small(model)
        except CompileError as error:
            raise typer.BadParameter(str(error)) from error
    with working("looking for regions"):
        return diagnose(loaded.model, loaded.whole, loaded.note)


def _list(as_json: bool) -> None:
    from dataclasses import asdict

    from moec.families.table import rows

    found = rows(seen=lambda row: say(f"{row.family}: {row.compiled}"))
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in found], indent=2))
        return
    heads = ("family", "compiled", "equals eager", "router", "experts", "why not")
    table = [(r.family, r.compiled, r.same, r.router, r.experts, r.reason) for r in found]
    print_table(heads, table)


def text_of(report: Report) -> str:
    """The report for people."""
    counts = f"{sum(s.count for s in report.structures)} MoE blocks"
    lines = [f"{report.model}: {counts} of {len(report.structures)} structures"]
    if not report.structures:
        lines = [f"{report.model}: no MoE block found; nothing would be compiled"]
    lines += [f"note: {report.note}"] if report.note else []
    for structure in report.structures:
        lines += ["", *_lines(structure)]
    lines += ["", *(f"warning: {w}" for w in report.warnings)] if report.warnings else []
    lines += ["", "versions: " + ", ".join(f"{n} {v}" for n, v in report.versions)]
    return "\n".join(lines)


def _lines(one: Structure) -> list[str]:
    fields = {
        "inference": one.inference,
        "training": one.training,
        "why": one.reason,
        "what to do": one.advice,
        "router": one.router,
        "experts": one.experts,
        "dtypes": ", ".join(one.dtypes),
        **{s.device: _served(s) for s in one.served},
    }
    head = f"{one.count} x {one.kind}, the first at {one.first}"
    body = [f"  {name}: {text}" for name, text in fields.items() if text]
    return [head, *body, *(f"  warning: {w}" for w in one.warnings)]


def _served(one: object) -> str:
    from moec.capture.described import Served

    assert isinstance(one, Served)
    if one.failure:
        return f"not available: {one.failure}"
    return f"{one.target}, {one.kernels} kernels and {one.others} calls"
