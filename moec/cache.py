"""Where emitted modules live: one Python file a content hash, written whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import platformdirs

from moec.errors import CodegenError


def cache_directory(directory: str | Path | None = None) -> Path:
    """The folder of emitted modules; the user's cache folder by default."""
    return Path(directory) if directory is not None else Path(platformdirs.user_cache_dir("moec")) / "emitted"


def store(source: str, name: str, directory: str | Path | None = None) -> Path:
    """Write a module's source under its content hash and return the path.

    An existing file of the same name is used only if it holds the same text. The text is written to a
    temporary name, synced and renamed, so no reader ever sees a part of it.
    """
    folder = cache_directory(directory)
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    path = folder / f"{name}_{digest}.py"
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if path.read_text() == source:
            return path
    folder.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=folder, suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(source)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except OSError as error:
        Path(temporary).unlink(missing_ok=True)
        raise CodegenError(f"cannot write the emitted module to {path}: {error}") from error
    return path


def load(path: Path) -> ModuleType:
    """Import an emitted module from its file; each file is imported once a process."""
    name = f"moec_emitted.{path.stem}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
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
