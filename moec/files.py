"""Files as moec reads and writes them: of bounded size, and whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import stat
import time
from pathlib import Path
from typing import Any

from moec.errors import MoecError, ParseError
from moec.printable import printable

TEMPORARY = ".tmp"
# A temporary file of this age, in seconds, belongs to a process that died while it wrote.
_ABANDONED = 3600.0
_MAX_DEPTH = 64
_JSON = re.compile(r'"(?:[^"\\]|\\.)*+"|[\[\]{}]|(?P<digits>[0-9]{400})')


def read_bounded(path: Path, limit: int) -> bytes | None:
    """The bytes of a file; ``None`` if there are more than ``limit``, of which no more is read."""
    with path.open("rb") as file:
        data = file.read(limit + 1)
    return data if len(data) <= limit else None


def decoded(data: bytes | None, name: str, limit: int) -> str:
    """The text of a file that was read up to ``limit`` bytes (``None``: there are more).

    A byte order mark is dropped.

    Raises:
        ParseError: too large, or not UTF-8; with line and column.
    """
    where = printable(name)
    if data is None or len(data) > limit:
        raise ParseError(f"{where}:1:1: larger than {limit >> 20} MiB, the most that is read")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8", errors="replace")
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        raise ParseError(
            f"{where}:{line}:{column}: not text in UTF-8 (byte {error.start})"
        ) from error


def read_json(text: str, name: str) -> Any:
    """The data in a JSON text of bounded depth and numbers.

    Raises:
        ParseError: ``name:line:column: message``.
    """
    depth = 0
    for match in _JSON.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(match[0], 0)
        if depth > _MAX_DEPTH or match["digits"]:
            words = "a number of too many digits" if match["digits"] else "nested too deep"
            raise _json_error(text, name, match.start(), words)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise _json_error(text, name, error.pos, error.msg) from error


def _json_error(text: str, name: str, offset: int, words: str) -> ParseError:
    line, column = text.count("\n", 0, offset) + 1, offset - text.rfind("\n", 0, offset)
    return ParseError(f"{name}:{line}:{column}: {words}")


def read_regular(path: Path, limit: int) -> bytes | None:
    """As :func:`read_bounded`; ``None`` too for a link, a pipe and whatever else is no file.

    Raises:
        FileNotFoundError, NotADirectoryError: there is nothing of that name.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK  # a pipe without a writer would block
    try:
        handle = os.open(path, flags)
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError:  # a link (ELOOP), a socket, or no permission
        return None
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            return None
        data = file.read(limit + 1)
    return data if len(data) <= limit else None


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that every reader sees all of it or what was there before.

    A temporary file beside it is written, synced and renamed. A link of that name is replaced, not
    followed: no file elsewhere is written.

    Raises:
        OSError: nothing was written.
    """
    temporary = path.parent / f".{secrets.token_hex(8)}{TEMPORARY}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    try:
        handle = os.open(temporary, flags, 0o666)
    except OSError as error:  # name the file that was wanted
        raise OSError(error.errno, error.strerror, str(path)) from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:  # an interrupt too must leave no temporary file behind
        temporary.unlink(missing_ok=True)
        raise


def remove_abandoned(folder: Path) -> None:
    """Remove temporary files that killed processes left in a folder."""
    oldest = time.time() - _ABANDONED
    for path in folder.glob(f".*{TEMPORARY}"):
        with contextlib.suppress(OSError):  # another process may be removing it
            if path.lstat().st_mtime < oldest:
                path.unlink()


def folder_inside(base: Path, *parts: str) -> Path:
    """A folder below ``base``, made if missing; the parts are names, never paths.

    Raises:
        MoecError: a link leads out of ``base``.
        OSError: it cannot be made.
    """
    folder = base.joinpath(*(_as_name(part) for part in parts))
    if not folder.resolve().is_relative_to(base.resolve()):
        raise MoecError(f"{folder} is a link that leads out of {base}; remove it, or name another")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _as_name(part: str) -> str:
    name = "".join(c if c.isprintable() and c not in "/\\" else "_" for c in part)[:100]
    return f"_{name}" if name in ("", ".", "..") else name


__all__ = [
    "decoded",
    "folder_inside",
    "read_bounded",
    "read_json",
    "read_regular",
    "remove_abandoned",
    "write_whole",
]
