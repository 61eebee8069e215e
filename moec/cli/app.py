"""The application: global options, and the list of commands."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from moec import logs
from moec.cli import graphs, lists, models
from moec.cli.bisect import bisect
from moec.cli.calibrate import calibrate
from moec.cli.console import DEBUG_FLAG, Commands
from moec.cli.diff import diff
from moec.cli.doctor import doctor
from moec.cli.explain import explain
from moec.cli.plan import plan
from moec.cli.reduce import reduce
from moec.cli.show import show
from moec.cli.tune import tune
from moec.reproducer import version_of

HELP = """A compiler for Mixture-of-Experts models in PyTorch: look at what it does to a model.

\b
Typical use, from a model to kernels:
  moec doctor config.json              what would be compiled, what not, why
  moec explain mixtral                 what becomes of each block, and why
  moec trace mixtral -o a.moe          the model's MoE blocks as text
  moec opt a.moe --dump steps -o b.moe optimise; steps/ has the IR after each pass
  moec run b.moe T=33                  interpret it on generated inputs
  moec emit a.moe -o kernels.py        the Python module that would run

Results go to stdout, everything else to stderr. Exit code 0: done; 1: an error, in one message;
2: wrong usage.
"""

# Boxes and colours are for terminals; a pipe gets plain text.
_MARKUP = "rich" if sys.stdout.isatty() else None
app = typer.Typer(
    cls=Commands,
    help=HELP,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=_MARKUP,  # type: ignore[arg-type]
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"moec {version_of('moec')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version."),
    ] = False,
    debug: Annotated[
        bool, typer.Option(DEBUG_FLAG, help="On an error print the traceback (allowed anywhere).")
    ] = False,
) -> None:
    """Options of all commands."""
    logs.configure()


for _command in (
    doctor,
    explain,
    models.trace,
    graphs.opt,
    graphs.run,
    graphs.emit,
    bisect,
    reduce,
    diff,
    show,
    plan,
    tune,
    calibrate,
    lists.passes,
    lists.ops,
):
    app.command()(_command)


def main() -> None:
    """Run the command line of this process and exit with its code."""
    app(prog_name="moec")
