"""A command that decides whether a graph is right, with the exit statuses of ``git bisect run``."""

from __future__ import annotations

import shlex
import subprocess
import tempfile
from pathlib import Path

from moec.bisect import StepTest, Untested
from moec.errors import PassError
from moec.ir.graph import Graph
from moec.ir.text import show
from moec.manager import Step

# As git bisect run reads them: 0 is good, 125 says nothing, others up to 127 are bad, and above
# it (a signal, a shell that was killed) the search stops.
UNTESTED = 125
_NOT_RUN = (126, 127)
_ABORT = 128


def command_problem(command: str, graph: Graph) -> str:
    """What is wrong if a command fails on a graph's file; nothing if it succeeds.

    Raises :class:`~moec.bisect.Untested` for status 125, and :class:`~moec.errors.PassError` for a
    command that cannot be run or was ended by a signal.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{graph.name}.moe"
        path.write_text(show(graph), encoding="utf-8")
        words = [word.replace("{}", str(path)) for word in shlex.split(command)]
        if "{}" not in command:
            words.append(str(path))
        done = subprocess.run(words, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode == UNTESTED:
        raise Untested(f"{words[0]} exits with status {UNTESTED}")
    if done.returncode < 0 or done.returncode in _NOT_RUN or done.returncode >= _ABORT:
        raise PassError(_stopped(words[0], done))
    return f"{words[0]} exits with status {done.returncode}" if done.returncode else ""


def _stopped(word: str, done: subprocess.CompletedProcess[str]) -> str:
    status = done.returncode
    how = f"was ended by signal {-status}" if status < 0 else f"exits with status {status}"
    last = (done.stderr.strip().splitlines() or [""])[-1]
    said = f" ({last})" if last else ""
    return (
        f"{word} {how}{said}: the search stops. Statuses are those of git bisect run: 0 is good, "
        "1 to 124 bad, 125 says nothing"
    )


def command_test(command: str, graph: Graph) -> StepTest:
    """A test that runs a command on what a pass made; ``graph`` must be good."""
    try:
        problem = command_problem(command, graph)
    except Untested as error:
        raise PassError(f"@{graph.name} cannot be tested before any pass: {error}") from error
    if problem:
        raise PassError(f"the command fails on @{graph.name} before any pass: {problem}")

    def test(step: Step) -> str:
        return command_problem(command, step.after) if step.changed else ""

    return test


__all__ = ["UNTESTED", "command_problem", "command_test"]
