"""Where emitted modules live: one Python file a content hash, written whole or not at all.

A file in the cache is there to be opened, stepped through and found again. It is never trusted: the
text that is imported is the text that was emitted, so a file that someone changed, or bytecode
beside it, cannot run.
"""

from __future__ import annotations

import hashlib
import importlib.abc
import importlib.util
import linecache
import re
import sys
import threading
import warnings
from pathlib import Path
from types import ModuleType

import platformdirs

from moec.errors import CodegenError
from moec.files import read_regular, remove_abandoned, write_whole
from moec.printable import printable

_UNSAFE = re.compile(r"[^A-Za-z0-9_]")
_MAX_NAME = 80
_LOADING = threading.RLock()
# What this process has warned about: a damaged file, a folder that cannot be written.
_warned: set[Path] = set()


def cache_directory(directory: str | Path | None = None) -> Path:
    """The folder of emitted modules; the user's cache folder by default."""
    return (
        Path(directory)
        if directory is not None
        else Path(platformdirs.user_cache_dir("moec")) / "emitted"
    )


def store(source: str, name: str, directory: str | Path | None = None) -> Path:
    """Write a module's source under its content hash and return the path.

    A file that is there already must hold exactly this text; another (damaged, or put there by
    someone) is reported once and written again. A folder that cannot be written is reported once
    too: the path then names a file that does not exist, and :func:`load` works all the same.
    """
    folder, data = cache_directory(directory), source.encode()
    digest = hashlib.sha256(data).hexdigest()[:16]
    path = folder / f"{_UNSAFE.sub('_', name)[:_MAX_NAME]}_{digest}.py"
    try:
        if not _holds(path, data):
            folder.mkdir(parents=True, exist_ok=True)
            remove_abandoned(folder)
            write_whole(path, data)
    except (OSError, ValueError) as error:  # ValueError: a name that no file system takes
        _warn(folder, f"cannot be written ({error}); emitted modules are kept in memory only")
    return path


def _holds(path: Path, data: bytes) -> bool:
    """Whether a file holds these bytes; another content is reported, a missing file is not."""
    try:
        found = read_regular(path, len(data))
    except (FileNotFoundError, NotADirectoryError):
        return False
    if found != data:
        _warn(path, "does not hold what was written to it; it is not used and is written again")
    return found == data


def forget() -> None:
    """Forget what was warned about."""
    _warned.clear()


def _warn(about: Path, words: str) -> None:
    if about not in _warned:
        _warned.add(about)
        warnings.warn(f"moec: the cache: {printable(str(about))} {words}", stacklevel=4)


class _Emitted(importlib.abc.ExecutionLoader):
    """Gives the emitted text, whatever the file of that name holds."""

    def __init__(self, path: Path, source: str) -> None:
        self.path, self.source = path, source

    def get_filename(self, fullname: str) -> str:
        """The file in the cache: where tracebacks and debuggers point."""
        return str(self.path)

    def get_source(self, fullname: str) -> str:
        """The emitted text."""
        return self.source


def load(path: Path, source: str) -> ModuleType:
    """Import an emitted module, ``source``, which :func:`store` wrote to ``path``; each is imported
    once a process.
    """
    name = f"moec_emitted.{path.stem}"
    with _LOADING:  # no other thread may see a module of which half has run
        return sys.modules[name] if name in sys.modules else _load(name, path, source)


def source_of(path: Path) -> str:
    """The text of a module that this process loaded, whatever its file holds."""
    return "".join(linecache.getlines(str(path)))


def _load(name: str, path: Path, source: str) -> ModuleType:
    loader = _Emitted(path, source)
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    if spec is None:
        raise CodegenError(f"{path} is no Python module")
    module = importlib.util.module_from_spec(spec)
    # Triton compiles what `inspect` gives it, which comes from here; without a time stamp the entry
    # is never exchanged for what the file holds.
    lines = source.splitlines(keepends=True)
    linecache.cache[str(path)] = len(source), None, lines, str(path)
    sys.modules[name] = module
    try:
        loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
