"""Times of a graph's ops, measured in another process that may hang or die."""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from moec.ir.graph import Graph
from moec.ir.text import show

# Runs of a module for a median.
ROUNDS = 15


class Timer:
    """Milliseconds of each op of lowered graphs at some sizes; a context manager.

    A graph that is not done within ``seconds`` ends the process, and the next one starts another.
    """

    def __init__(self, sizes: Mapping[str, int], seconds: float = 90.0) -> None:
        self.sizes, self.seconds = sizes, seconds
        self._folder = tempfile.TemporaryDirectory()
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[str] = queue.Queue()

    def __enter__(self) -> Timer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()
        self._folder.cleanup()

    def __call__(self, graph: Graph, seconds: float) -> list[float] | str:
        """The times in the order of the graph's ops, or why there are none; in so many seconds."""
        path = Path(self._folder.name) / "graph.moe"
        path.write_text(show(graph), encoding="utf-8")
        request = {
            "graph": str(path),
            "sizes": dict(self.sizes),
            "target": "triton",
            "rounds": ROUNDS,
        }
        limit = min(self.seconds, max(seconds, 1.0))
        try:
            line = self._asked(json.dumps(request), limit)
        except queue.Empty:
            self._end()
            return f"stopped after {limit:.0f} s"
        if not line:
            self._end()
            return "ended its process"
        found: dict[str, Any] = json.loads(line)
        return found["ms"] if "ms" in found else str(found["failed"])

    def _asked(self, request: str, limit: float) -> str:
        process = self._process or self._start()
        if process.stdin is None:
            return ""
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(request + "\n")
            process.stdin.flush()
        return self._answers.get(timeout=limit)

    def _start(self) -> subprocess.Popen[str]:
        self._answers = queue.Queue()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "moec.tuning.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        reading = threading.Thread(
            target=_read, args=(self._process.stdout, self._answers), daemon=True
        )
        reading.start()
        return self._process

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                with contextlib.suppress(OSError):
                    pipe.close() if pipe is not None else None
        self._process = None


def _read(lines: IO[str] | None, answers: queue.Queue[str]) -> None:
    for line in lines or ():
        answers.put(line)
    answers.put("")  # the process is gone
