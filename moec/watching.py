"""What watches the compilations of a session: dumps, logs, PyTorch's trace, a trace of the time."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field
from pathlib import Path

from moec import logs
from moec.files import folder_inside
from moec.manager import Observer
from moec.observers import Dump, TracePasses
from moec.torch_trace import TorchTrace
from moec.trace_events import TraceEvents, recording

DUMP_VARIABLE = "MOEC_DUMP"


@dataclass
class Watching:
    """Where a session writes what it does; ``dump`` is a folder, ``trace`` a file."""

    dump: str | Path | None = None
    trace: str | Path | None = None
    events: TraceEvents = field(default_factory=TraceEvents)

    def observers(self, name: str, mode: str) -> list[Observer]:
        """What watches the passes over the graph of a region in a mode.

        Raises:
            OSError: the folder of the dump cannot be made.
        """
        place = name or "model"
        found: list[Observer] = [logs.LogPasses(f"{place} ({mode})"), TorchTrace(f"{place}_{mode}")]
        if self.dump is not None:
            found.append(Dump(new_folder(folder_inside(Path(self.dump), place), mode)))
        return [*found, TracePasses()]

    def recording(self) -> contextlib.AbstractContextManager[None]:
        """A context in which spans of time are recorded and, at its end, written."""
        if self.trace is None:
            return contextlib.nullcontext()
        return recording(self.events, self.trace)


def from_environment() -> Watching:
    """What the user's environment asks for; the logs that it names are turned on.

    Raises:
        CompileError: it names an unknown log.
    """
    logs.configure()
    return Watching(dump=os.environ.get(DUMP_VARIABLE) or None)


def new_folder(parent: Path, name: str) -> Path:
    """A new folder ``name`` in ``parent``, with a number for a second one: nothing is overwritten.

    Raises:
        OSError: it cannot be made.
    """
    parent.mkdir(parents=True, exist_ok=True)
    folder, count = parent / name, 1
    while True:
        try:
            folder.mkdir()
        except FileExistsError:
            count += 1
            folder = parent / f"{name}-{count}"
        else:
            return folder


__all__ = ["Watching", "from_environment", "new_folder"]
