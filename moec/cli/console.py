"""What all commands share: where text goes, how errors and progress look, how files are read."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from typer.core import TyperGroup

from moec.errors import MoecError, ParseError
from moec.files import decoded, read_bounded, write_whole
from moec.ir import Graph, parse_file
from moec.ir.lexer import MAX_BYTES
from moec.manager import PassCall, parse_pipeline
from moec.printable import printable
from moec.reproducer import instruction

DEBUG_FLAG = "--debug"


class Commands(TyperGroup):
    """The group of commands: takes ``--debug`` anywhere, turns errors into a line and code 1."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Take ``--debug`` out of the arguments, wherever it stands."""
        ctx.obj = DEBUG_FLAG in args
        return super().parse_args(ctx, [a for a in args if a != DEBUG_FLAG])

    def invoke(self, ctx: Any) -> Any:
        """Run the command; errors that a user can act on become one message."""
        try:
            return super().invoke(ctx)
        except (MoecError, OSError) as error:
            _report(error, describe(error), bool(ctx.obj))
        except Exception as error:  # a bug; a user gets one message all the same
            if _is_of_typer(error):
                raise
            words = f"internal error: {type(error).__name__}: {error}"
            _report(
                error, f"{words}\nthis is a bug in moec; {DEBUG_FLAG} shows where", bool(ctx.obj)
            )
        raise typer.Exit(1)


def _is_of_typer(error: Exception) -> bool:
    """Whether it is a way out of a command, or wrong usage: those carry the code to exit with."""
    return isinstance(error, typer.Abort) or hasattr(error, "exit_code")


def _report(error: BaseException, message: str, debug: bool) -> None:
    if debug:
        traceback.print_exception(error)
    else:
        say("\n".join([f"moec: {message}", *getattr(error, "__notes__", ())]))


def describe(error: Exception) -> str:
    """An error's message; for one of the operating system, the file first."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def say(text: str) -> None:
    """A line for the reader, on stderr: stdout carries results only."""
    typer.echo(text, err=True)


# progress
@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """Show that something takes time: a spinner on a terminal, otherwise a line."""
    console = Console(stderr=True)
    if not console.is_terminal:
        say(f"{what} ...")
        yield
        return
    with console.status(f"{what} ..."):
        yield


@contextlib.contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[str], None]]:
    """A bar of ``total`` steps on a terminal and nothing elsewhere; call the result once a step."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns,
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task(what, total=total)

        def step(now: str) -> None:
            bar.update(task, advance=1, description=f"{what}: {now}")

        yield step


# tables
def print_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on a terminal; elsewhere one line a row, its cells separated by tabs."""
    console = Console()
    if not console.is_terminal:
        for row in rows:
            typer.echo("\t".join(row).rstrip())
        return
    table = Table(*heads, box=None, header_style="bold")
    for row in rows:
        table.add_row(*(cell.replace("[", "\\[") for cell in row))
    console.print(table)


# files
def read_text(path: Path) -> str:
    """The text of a file, of at most ``MAX_BYTES``; "-" is the standard input."""
    data = (
        sys.stdin.buffer.read(MAX_BYTES + 1) if str(path) == "-" else read_bounded(path, MAX_BYTES)
    )
    return decoded(data, str(path), MAX_BYTES)


def read_graphs(path: Path, name: str | None = None) -> list[Graph]:
    """The graphs of a file, or the one called ``name``."""
    return graphs_in(read_text(path), path, name)


def graphs_in(text: str, path: Path, name: str | None) -> list[Graph]:
    """The graphs of a text that was read from ``path``, or the one called ``name``."""
    graphs = parse_file(text, printable(str(path)))
    if not graphs:
        raise ParseError(f"{path}:1:1: holds no graph; a graph begins with: graph @name(")
    if name is None:
        return graphs
    chosen = [g for g in graphs if g.name == name.removeprefix("@")]
    if not chosen:
        there = ", ".join(f"@{g.name}" for g in graphs)
        raise ParseError(f"{path}:1:1: has no graph {name!r}; it holds {there}")
    return chosen


def calls_for(passes: str | None, text: str, path: Path, default: str) -> list[PassCall]:
    """The passes named by an option, else by the ``// run:`` line of a file's text, else the
    default.
    """
    if passes is not None:
        return parse_pipeline(passes)
    found = instruction(text, "run", str(path))
    return parse_pipeline(*found) if found else parse_pipeline(default)


def write_result(text: str, path: Path | None) -> None:
    """Write to a file, whole or not at all, or to stdout; a device or a pipe is written to."""
    if path is None or str(path) == "-":
        typer.echo(text, nl=False)
    elif path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
    else:
        write_whole(path.resolve(), text.encode())
