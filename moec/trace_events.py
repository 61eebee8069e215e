"""Compile time as Chrome-trace JSON, which Perfetto and ``chrome://tracing`` load.

One complete event ("X") for each region, capture, pass, emission and kernel compilation; times are
in microseconds. The format is the Trace Event Format of Chromium's tracing.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moec.files import write_whole


@dataclass
class TraceEvents:
    """The events of one compilation; threads may add to it at a time."""

    events: list[dict[str, Any]] = field(default_factory=list)

    def add(self, name: str, category: str, start: int, end: int, **arguments: Any) -> None:
        """One event; ``start`` and ``end`` are in nanoseconds."""
        where = {"pid": os.getpid(), "tid": threading.get_native_id()}
        times = {"ts": start / 1e3, "dur": (end - start) / 1e3}
        kind = {"name": name, "cat": category, "ph": "X"}
        self.events.append({**kind, **times, **where, "args": arguments})

    def write(self, path: str | Path) -> None:
        """Write the file whole, or not at all."""
        text = json.dumps({"traceEvents": list(self.events), "displayTimeUnit": "ms"})
        write_whole(Path(path), text.encode())


_RECORDING: ContextVar[TraceEvents | None] = ContextVar("moec_trace_events", default=None)


def current() -> TraceEvents | None:
    """The events that are being recorded, if any."""
    return _RECORDING.get()


@contextlib.contextmanager
def recording(events: TraceEvents, path: str | Path) -> Iterator[None]:
    """Record the spans inside; the outermost one writes the file when it ends."""
    if _RECORDING.get() is events:
        yield
        return
    token = _RECORDING.set(events)
    try:
        yield
    finally:
        _RECORDING.reset(token)
        _write(events, path)


def _write(events: TraceEvents, path: str | Path) -> None:
    """Write the file; a trace that cannot be written must not stop a model."""
    try:
        events.write(path)
    except OSError as error:
        warnings.warn(f"moec: the trace {path} cannot be written: {error}", stacklevel=2)


@contextlib.contextmanager
def span(name: str, category: str, **arguments: Any) -> Iterator[None]:
    """An event that lasts as long as the context, if events are recorded."""
    events = _RECORDING.get()
    start = time.perf_counter_ns()
    try:
        yield
    finally:
        if events is not None:
            events.add(name, category, start, time.perf_counter_ns(), **arguments)


__all__ = ["TraceEvents", "current", "recording", "span"]
