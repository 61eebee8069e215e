"""Reproducers: what fails while compiling leaves a file that makes it fail again."""

from __future__ import annotations

import hashlib
import platform
import re
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import TracebackType

from moec.errors import InvarianceError, IRError, MeaningError, ParseError
from moec.files import write_whole
from moec.ir.graph import Graph
from moec.ir.text import show
from moec.manager import PassCall, Place, Step
from moec.observers import verify_step
from moec.printable import printable
from moec.targets import TARGETS

# each part of a line can be matched in one way only: no line takes more than linear time
_LINE = re.compile(r"^//[ \t]*(?P<word>run|check|emit):[ \t]*(?P<text>.*)$", re.MULTILINE)
_SIZE = re.compile(r"(?P<name>[A-Za-z_]\w*)=(?P<size>\d{1,18})", re.ASCII)
_FRAMES = 6


@dataclass(frozen=True)
class Emission:
    """What a reproducer of code generation asks for: a target, and whether the module is run."""

    target: str
    trial: bool = False

    def __str__(self) -> str:
        return self.target + (", try" if self.trial else "")


class Reproducer:
    """An observer that knows which pass runs; as a context manager it writes the file.

    ::

        reproducer = Reproducer(folder)
        with reproducer:
            result = PassManager(pipeline, [Verify(), reproducer]).run(graph)

    The exception goes on, with a note that names the file (also in ``path``). ``moec opt`` on the
    file runs the pass on the same graph; ``moec emit`` does what :meth:`emits` was told of.
    """

    def __init__(self, folder: str | Path = ".") -> None:
        self.folder = Path(folder)
        self.path: Path | None = None
        self._doing: tuple[PassCall | Emission, Graph] | None = None

    def before(self, call: PassCall, graph: Graph, index: int) -> None:
        """Remember the pass that is about to run, and its input."""
        self._doing = call, graph

    def after(self, step: Step, index: int) -> None:
        """Nothing: until the next pass begins, observers may still object to this one."""

    def emits(self, graph: Graph, emission: Emission) -> None:
        """Remember that code is about to be generated for a graph (and tried)."""
        self._doing = emission, graph

    def verify(self, history: Sequence[Step]) -> None:
        """Raise for the first pass that left a malformed graph, as if it had been watched."""
        for step in history:
            try:
                verify_step(step)
            except IRError:
                self._doing = step.call, step.before
                raise

    def __enter__(self) -> Reproducer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, Exception) and not isinstance(error, InvarianceError):
            self.write(error)  # a refusal is no fault of the compiler

    def write(self, error: Exception) -> None:
        """Write the file for what was going on when an exception came, and note its place."""
        if self._doing is None or isinstance(error.__cause__, OSError):
            return  # a full disk is not in the graph
        try:
            self.path = write_reproducer(self.folder, *self._doing, error)
        except OSError as failure:
            # The pass's own error matters more than the missing file.
            error.add_note(f"no reproducer could be written: {failure}")
        else:
            error.add_note(f"reproducer: {self.path} (replay it with: {self.command})")

    @property
    def command(self) -> str:
        """The command that fails in the same way."""
        emits = self._doing is not None and isinstance(self._doing[0], Emission)
        return f"moec {'emit' if emits else 'opt'} {self.path}"

    @property
    def text(self) -> str:
        """Where the file is, for a warning."""
        if self.path is None:
            return "No reproducer was written"
        return f"Reproducer: {self.path} (replay it with: {self.command})"


def write_reproducer(
    folder: Path, doing: PassCall | Emission, graph: Graph, error: Exception
) -> Path:
    """Write ``moec-repro-<hash>.moe``: pass, versions, error, and the graph before the pass.

    The hash is that of pass and graph, so the same failure gives the same file.

    Raises:
        OSError: the file cannot be written.
    """
    key = hashlib.sha256(f"{doing}\n{graph.fingerprint}".encode()).hexdigest()[:8]
    path = folder / f"moec-repro-{key}.moe"
    words = [*str(error).replace(str(Path.home()), "~").splitlines(), *_frames(error)]
    header = [*_instructions(doing, error), f"// {versions()}", f"// {type(error).__name__}:"]
    header += [f"//   {line}".rstrip() for line in words]
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, "\n".join([*map(printable, header), show(graph)]).encode())
    return path


def _instructions(doing: PassCall | Emission, error: Exception) -> list[str]:
    if isinstance(doing, Emission):
        return [f"// emit: {doing}"]
    if not isinstance(error, MeaningError):
        return [f"// run: {doing}"]
    sizes = "".join(f", {name}={size}" for name, size in error.sizes.items())
    return [f"// run: {doing}", f"// check: seed={error.seed}{sizes}"]


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
    found = instruction(text, "run")
    return found[0] if found else None


def instruction(text: str, word: str, name: str = "") -> tuple[str, Place] | None:
    """What stands in the ``// word:`` line of the file ``name``, and its place."""
    for match in _LINE.finditer(text):
        said = match["text"].rstrip()
        if match["word"] == word and said:
            start = match.start("text")
            column = start - text.rfind("\n", 0, start)
            return said, Place(name, text.count("\n", 0, start) + 1, column)
    return None


def check_of(text: str, name: str = "") -> tuple[dict[str, int], int] | None:
    """Sizes and seed in the ``// check:`` line of a file, if it has one.

    Raises:
        ParseError: the line is malformed.
    """
    found = instruction(text, "check", name)
    if found is None:
        return None
    said, place = found
    items = [_SIZE.fullmatch(item.strip()) for item in said.split(",")]
    if any(item is None for item in items):
        where = place.of(said, 0)
        raise ParseError(f"{where}: cannot read {said[:80]!r}; write // check: seed=0, T=33")
    sizes = {item["name"]: int(item["size"]) for item in items if item is not None}
    return sizes, sizes.pop("seed", 0)


def emission_of(text: str, name: str = "") -> Emission | None:
    """What the ``// emit:`` line of a file asks for, if it has one.

    Raises:
        ParseError: the line is malformed.
    """
    found = instruction(text, "emit", name)
    if found is None:
        return None
    said, place = found
    target, _, rest = said.partition(",")
    if target.strip() not in TARGETS or rest.strip() not in ("", "try"):
        words = f"cannot read {said[:80]!r}; write // emit: triton, or // emit: aten, try"
        raise ParseError(f"{place.of(said, 0)}: {words}")
    return Emission(target.strip(), bool(rest.strip()))
