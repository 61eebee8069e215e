"""Where emitted modules live: one Python file a content hash, written whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import sys
import tempfile
import threading
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

import platformdirs

from moec.errors import CodegenError


def cache_directory(directory: str | Path | None = None) -> Path:
    """The folder of emitted modules; the user's cache folder by default."""
    return (
        Path(directory)
        if directory is not None
        else Path(platformdirs.user_cache_dir("moec")) / "emitted"
    )


def store(source: str, name: str, directory: str | Path | None = None) -> Path:
    """Write a module's source under its content hash and return the path.

    An existing file of the same name is used only if it holds the same text. The text is written to
    a temporary name, synced and renamed, so no reader ever sees a part of it.
    """
    folder = cache_directory(directory)
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    path = folder / f"{name}_{digest}.py"
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if path.read_text(encoding="utf-8") == source:
            return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _replace(path, source)
    except OSError as error:
        raise CodegenError(f"cannot write the emitted module to {path}: {error}") from error
    return path


def _replace(path: Path, source: str) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(source)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:  # an interrupt too must leave no temporary file behind
        Path(temporary).unlink(missing_ok=True)
        raise


class _SourceOnly(SourceFileLoader):
    """Compiles the file's own text each time: bytecode next to it may be of another text."""

    def get_code(self, fullname: str) -> CodeType:
        """The code of the text that the file holds now."""
        path = self.get_filename(fullname)
        code: CodeType = self.source_to_code(self.get_data(path), path)
        return code


_LOADING = threading.RLock()


def load(path: Path) -> ModuleType:
    """Import an emitted module from its file; each file is imported once a process."""
    name = f"moec_emitted.{path.stem}"
    with _LOADING:  # no other thread may see a module of which half has run
        return sys.modules[name] if name in sys.modules else _load(name, path)


def _load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path, loader=_SourceOnly(name, str(path)))
    if spec is None or spec.loader is None:
        raise CodegenError(f"{path} is no Python module")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
