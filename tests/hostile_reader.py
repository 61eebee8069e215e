"""Read every file of a folder as moec's commands do, and print what the process did besides: opened
for writing outside of the folder, ran, imported, connected to.

``python -m tests.hostile_reader FOLDER`` prints one JSON object.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

from moec import cache
from moec.capture.model_spec import read_config
from moec.cli.console import calls_for, graphs_in, read_text
from moec.codegen import emit_module
from moec.drawing import dot, mermaid
from moec.errors import CodegenError, MoecError
from moec.ir.text import show
from moec.ir.verify import verify
from moec.manager import PassManager, parse_pipeline
from moec.observers import Dump
from moec.pipeline import pipeline
from moec.reduce import source_of_test
from moec.reproducer import check_of, emission_of, write_reproducer

PASSES = "simplify, cse, dce"
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
# events of the interpreter that reading a file has no reason for
FORBIDDEN = (
    "subprocess.",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "socket.",
)
CHANGES = ("os.rename", "os.remove", "os.symlink", "os.link", "os.mkdir", "os.chmod", "shutil.")


class Watch:
    """An audit hook: notes what happens while it is on."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.on, self.seen = folder, False, list[str]()
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.on and self.is_odd(event, arguments):
            self.seen.append(f"{event} {arguments!r}"[:300])

    def is_odd(self, event: str, arguments: tuple[Any, ...]) -> bool:
        if event == "open":
            path, _, flags = arguments
            return bool(flags & WRITES) and not self.inside(path)
        if event.startswith(CHANGES):
            return not self.inside(arguments[0])
        return event in ("exec", "import") or event.startswith(FORBIDDEN)

    def inside(self, path: Any) -> bool:
        if isinstance(path, int):
            return True
        found = Path(os.fsdecode(path))
        return (found.parent.resolve() / found.name).is_relative_to(self.folder)


def read(path: Path, out: Path) -> str:
    """All that commands do with a file but run what it computes."""
    if path.suffix == ".json":
        read_config(path)
        return "taken"
    text = read_text(path)
    graphs = graphs_in(text, path, None)
    calls_for(None, text, path, PASSES)
    check_of(text, str(path))
    emission_of(text, str(path))
    for graph in graphs:
        verify(graph)
        result = PassManager(PASSES, [Dump(out / "dump")]).run(graph)
        call = parse_pipeline(PASSES)[0]
        write_reproducer(out, call, graph, ValueError("odd\rtext"))
        compile(source_of_test(graph, str(call), show(graph), str(graph)), "test.py", "exec")
        (out / "drawn.txt").write_text(dot(graph) + mermaid(graph))
        with contextlib.suppress(CodegenError):  # not every graph has code
            for target in ("aten", "triton"):
                source = emit_module(result, target)
                compile(source, "emitted.py", "exec")
                cache.store(source, graph.name, out / "cache")
    return "taken"


def attempt(path: Path, out: Path) -> tuple[str, float]:
    """What became of a file, and the processor time it took."""
    start = time.process_time()
    try:
        words = read(path, out)
    except MoecError as error:
        words = str(error)
    except Exception as error:  # the test says which file did it
        words = f"{type(error).__name__} {traceback.format_exc()[-600:]}"
    return words, time.process_time() - start


def main(folder: Path) -> None:
    """Read all files twice: first so that everything is imported, then watched."""
    warnings.simplefilter("error")
    os.chdir(folder)
    watch, out = Watch(folder), folder / "out"
    out.mkdir()
    good = folder / "good.moe"
    good.write_text(
        "graph @g(%x: f32[Min(T, 2), 4]) {\n  %y = t.neg(%x) : f32[Min(T, 2), 4]\n  return %y\n}\n"
    )
    configuration = folder / "good.json"
    configuration.write_text('{"model_type": "olmoe"}')
    for path in (good, configuration):
        attempt(path, out)
    PassManager(pipeline("triton", False))
    results = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() or path.is_symlink():
            watch.on = True
            results[path.name] = attempt(path, out)
            watch.on = False
    print(json.dumps({"results": results, "seen": watch.seen}))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
