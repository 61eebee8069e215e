"""Logs of what the compiler decides, for Python's ``logging``, ``TORCH_LOGS`` and ``MOEC_LOGS``.

The loggers are ``moec.regions``, ``moec.passes``, ``moec.kernels`` and ``moec.recompiles``: one
line a decision at level INFO, graphs and emitted code at level DEBUG. ``TORCH_LOGS="moec"`` or
``"+moec"`` turns on all of them; ``MOEC_LOGS`` chooses.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

from moec.cache import source_of
from moec.errors import CompileError
from moec.ir.graph import Graph
from moec.ir.text import show
from moec.manager import Step
from moec.observers import Observer, summary

if TYPE_CHECKING:
    from moec.runtime.artifact import Artifact

VARIABLE = "MOEC_LOGS"
NAMES = {
    "regions": "which blocks are compiled, which are not and why, how long their capture took",
    "passes": "what each pass changed, and how long it took",
    "kernels": "the kernels of each emitted module, what has no kernel and why, the file",
    "recompiles": "what was compiled again, and which property of the call was new",
}
REGIONS, PASSES, KERNELS, RECOMPILES = (logging.getLogger(f"moec.{name}") for name in NAMES)


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to the ``sys.stderr`` of the moment."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


_HANDLER = _Stderr(sys.stderr)
_HANDLER.setFormatter(logging.Formatter("[%(name)s] %(message)s"))


def configure(text: str | None = None) -> None:
    """Turn on the logs that ``text`` names: ``regions, +kernels``, or ``all``.

    Without a text it is ``MOEC_LOGS``. A plus asks for level DEBUG. An empty text changes nothing.

    Raises:
        CompileError: an unknown name.
    """
    text = os.environ.get(VARIABLE, "") if text is None else text
    for item in filter(None, (part.strip() for part in text.split(","))):
        for name in _names(item.removeprefix("+")):
            _turn_on(name, logging.DEBUG if item.startswith("+") else logging.INFO)


def _names(item: str) -> Sequence[str]:
    if item == "all":
        return list(NAMES)
    if item not in NAMES:
        known = "; ".join(f"{name}: {words}" for name, words in NAMES.items())
        raise CompileError(f"{VARIABLE}: unknown log {item!r}; logs are all, or {known}")
    return [item]


def _turn_on(name: str, level: int) -> None:
    logger = logging.getLogger(f"moec.{name}")
    logger.setLevel(level)
    if not logging.getLogger("moec").handlers and not logger.handlers:  # TORCH_LOGS has its own
        logger.addHandler(_HANDLER)
        logger.propagate = False


_KERNEL = re.compile(r"^@launch\.Kernel\n@triton\.jit.*\ndef (\w+)", re.MULTILINE)
_NO_KERNEL = re.compile(r"# (no kernel: .*)")


def log_artifact(artifact: Artifact, name: str, seconds: float) -> None:
    """Log a module that was emitted for a region, and the kernels in it."""
    if not KERNELS.isEnabledFor(logging.INFO):
        return
    source = source_of(artifact.path)
    kernels = ", ".join(_KERNEL.findall(source)) or "library calls"
    missing = "".join(f"; {text}" for text in dict.fromkeys(_NO_KERNEL.findall(source)))
    words = (name, artifact.mode, artifact.target, seconds, kernels + missing, artifact.path)
    KERNELS.info("%s: %s, %s, compiled in %.2f s: %s; %s", *words)
    KERNELS.debug("%s", source)


class LogPasses(Observer):
    """Log what each pass changed in the graph of a region."""

    def __init__(self, name: str) -> None:
        self.name = name

    def after(self, step: Step, index: int) -> None:
        if step.changed:
            PASSES.info("%s: %02d %s: %s", self.name, index + 1, step.call, summary(step))
            PASSES.debug("%s", _Shown(step.after))


class _Shown:
    """A graph as text, made only if somebody reads it."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def __str__(self) -> str:
        return show(self.graph)


__all__ = [
    "KERNELS",
    "NAMES",
    "PASSES",
    "RECOMPILES",
    "REGIONS",
    "LogPasses",
    "configure",
    "log_artifact",
]
