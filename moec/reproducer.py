"""Reproducers: a pass that raises leaves a file that makes it raise again."""

from __future__ import annotations

import hashlib
import platform
import re
import traceback
from importlib import metadata
from pathlib import Path
from types import TracebackType

from moec.ir.graph import Graph
from moec.ir.text import show
from moec.manager import PassCall, Step

_RUN = re.compile(r"^//\s*run:\s*(?P<pipeline>\S.*?)\s*$", re.MULTILINE)
_FRAMES = 6


class Reproducer:
    """An observer that knows which pass runs; as a context manager it writes the file.

    ::

        reproducer = Reproducer(folder)
        with reproducer:
            result = PassManager(pipeline, [Verify(), reproducer]).run(graph)

    The exception goes on, with a note that names the file (also in ``path``). ``moec opt`` on the
    file runs the pass on the same graph.
    """

    def __init__(self, folder: str | Path = ".") -> None:
        self.folder = Path(folder)
        self.path: Path | None = None
        self._running: tuple[PassCall, Graph] | None = None

    def before(self, call: PassCall, graph: Graph, index: int) -> None:
        """Remember the pass that is about to run, and its input."""
        self._running = call, graph

    def after(self, step: Step, index: int) -> None:
        """Nothing: until the next pass begins, observers may still object to this one."""

    def __enter__(self) -> Reproducer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, Exception) and self._running is not None:
            self._note(error, *self._running)

    def _note(self, error: Exception, call: PassCall, graph: Graph) -> None:
        try:
            self.path = write_reproducer(self.folder, call, graph, error)
        except OSError as failure:
            # The pass's own error matters more than the missing file.
            error.add_note(f"no reproducer could be written: {failure}")
        else:
            error.add_note(f"reproducer: {self.path} (replay it with: moec opt {self.path})")


def write_reproducer(folder: Path, call: PassCall, graph: Graph, error: Exception) -> Path:
    """Write ``moec-repro-<hash>.moe``: pass, versions, error, and the graph before the pass.

    The hash is that of pass and graph, so the same failure gives the same file.

    Raises:
        OSError: the file cannot be written.
    """
    key = hashlib.sha256(f"{call}\n{graph.fingerprint}".encode()).hexdigest()[:8]
    path = folder / f"moec-repro-{key}.moe"
    words = [*str(error).splitlines(), *_frames(error)]
    header = [f"// run: {call}", f"// {versions()}", f"// {type(error).__name__}:"]
    header += [f"//   {line}".rstrip() for line in words]
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*header, show(graph)]), encoding="utf-8")
    return path


def _frames(error: Exception) -> list[str]:
    """Where the error came from, innermost last; files without their folders, which are private."""
    frames = traceback.extract_tb(error.__traceback__)[-_FRAMES:]
    return [f"in {f.name}, {Path(f.filename).name} line {f.lineno}" for f in frames]


def versions() -> str:
    """The versions that a report needs, on one line."""
    packages = ", ".join(f"{name} {version_of(name)}" for name in ("moec", "torch"))
    return f"{packages}, python {platform.python_version()}"


def version_of(package: str) -> str:
    """The installed version of a package; "(not installed)" for a checkout."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(not installed)"


def pipeline_of(text: str) -> str | None:
    """The pipeline in the ``// run:`` line of a file, if it has one."""
    match = _RUN.search(text)
    return match["pipeline"] if match else None
