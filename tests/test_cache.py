"""The store of emitted modules: whole or not there, and never anyone else's text."""

from __future__ import annotations

import errno
import inspect
import linecache
import os
import py_compile
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import platformdirs
import pytest
import torch

import moec
from moec import cache
from moec.fuzz import cache_stress
from tests.bad_models import HIDDEN, Block


@pytest.fixture(autouse=True)
def nothing_warned() -> Iterator[None]:
    cache.forget()
    yield


SOURCE = "VALUE = 1\n" + "# a line\n" * 500


def test_same_text_is_stored_once(tmp_path: Path) -> None:
    first = cache.store(SOURCE, "name", tmp_path)
    stamp = first.stat().st_mtime_ns
    assert cache.store(SOURCE, "name", tmp_path) == first
    assert first.stat().st_mtime_ns == stamp
    assert cache.store(SOURCE + "VALUE = 2\n", "name", tmp_path) != first
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".py", ".py"]


def test_text_comes_back_unchanged(tmp_path: Path) -> None:
    text = "VALUE = 'é → ∑'\n"
    path = cache.store(text, "name", tmp_path)
    assert path.read_text(encoding="utf-8") == text
    assert cache.load(path, text).VALUE == "é → ∑"


@pytest.mark.parametrize(
    "content",
    [
        SOURCE[: len(SOURCE) // 2].encode(),  # torn by a crash
        b"",
        b"\xff\xfe not text",
        SOURCE.replace("VALUE = 1", "VALUE = 9").encode(),  # another text of the same size
        SOURCE.encode() + b"VALUE = 9\n",
    ],
    ids=["torn", "empty", "binary", "foreign", "longer"],
)
def test_a_file_with_another_text_is_reported_once_and_written_again(
    tmp_path: Path, content: bytes
) -> None:
    path = cache.store(SOURCE, "other", tmp_path)
    path.write_bytes(content)
    with pytest.warns(UserWarning, match=r"other_\w+\.py does not hold what was written") as caught:
        assert cache.store(SOURCE, "other", tmp_path) == path
        assert path.read_text(encoding="utf-8") == SOURCE
        path.write_bytes(content)
        assert cache.store(SOURCE, "other", tmp_path) == path
    assert len(caught) == 1
    assert path.read_text(encoding="utf-8") == SOURCE


def test_what_runs_is_what_was_emitted_whatever_the_file_holds(tmp_path: Path) -> None:
    """Neither a changed file, nor bytecode beside it, nor a source read later is the module's."""
    source = f"{SOURCE}def f():\n    return 1\n"
    path = cache.store(source, "changed", tmp_path)
    foreign = source.replace("VALUE = 1", "VALUE = 9").replace("return 1", "return 9")
    path.write_text(foreign, encoding="utf-8")
    py_compile.compile(str(path), doraise=True)
    module = cache.load(path, source)
    assert (module.VALUE, module.f()) == (1, 1)
    linecache.checkcache()
    assert inspect.getsource(module.f) == "def f():\n    return 1\n"


def test_links_are_neither_read_nor_written_through(tmp_path: Path) -> None:
    outside = tmp_path / "outside.txt"
    outside.write_text(SOURCE)
    folder = tmp_path / "cache"
    path = cache.store(SOURCE, "linked", folder)
    path.unlink()
    path.symlink_to(outside)
    outside.write_text("mine")
    with pytest.warns(UserWarning, match="does not hold"):
        assert cache.store(SOURCE, "linked", folder) == path
    assert outside.read_text() == "mine"
    assert not path.is_symlink() and path.read_text() == SOURCE


def test_a_pipe_in_place_of_an_entry_does_not_block(tmp_path: Path) -> None:
    path = cache.store(SOURCE, "pipe", tmp_path)
    path.unlink()
    os.mkfifo(path)
    with pytest.warns(UserWarning, match="does not hold"):
        cache.store(SOURCE, "pipe", tmp_path)
    assert path.read_text() == SOURCE


NAMES = ("../../up", "/etc/passwd", "a\0b", "n" * 4000, "new\nline", "\u202eevil", 'quote"""', "")


@pytest.mark.parametrize("name", NAMES)
def test_names_are_never_paths(tmp_path: Path, name: str) -> None:
    path = cache.store(SOURCE, name, tmp_path)
    assert path.parent == tmp_path
    assert path.read_text() == SOURCE
    assert re.fullmatch(r"\w{0,80}_[0-9a-f]{16}\.py", path.name, re.ASCII)


@pytest.mark.parametrize("folder", ["with spaces", "ünï/çödé ∑", 'quote\'s "folder"'])
def test_folders_of_any_name(tmp_path: Path, folder: str) -> None:
    source = f"{SOURCE}NAME = {folder!r}\n"
    path = cache.store(source, "name", tmp_path / folder)
    assert cache.load(path, source).NAME == folder


def _full(handle: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def _read_only(path: Any, flags: int, *rest: Any, **options: Any) -> int:
    if flags & os.O_CREAT:
        raise OSError(errno.EROFS, "Read-only file system", str(path))
    return _open(path, flags, *rest, **options)


_open = os.open


@pytest.mark.parametrize("fault", ["full", "read only", "a file in the way", "no such device"])
def test_without_a_folder_modules_stay_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """One warning for the folder; both modules work, with their sources."""
    folder = tmp_path / fault
    if fault == "full":
        monkeypatch.setattr(os, "fsync", _full)
    elif fault == "read only":
        monkeypatch.setattr(os, "open", _read_only)
    else:
        folder = Path("/dev/null/cache") if fault == "no such device" else folder
        (tmp_path / fault).write_text("")
    modules = []
    with pytest.warns(UserWarning, match=r"the cache: .* cannot be written .* memory") as caught:
        for number in (1, 2):
            source = f"# {fault}\ndef f():\n    return {number}\n"
            path = cache.store(source, "name", folder)
            assert not path.exists()
            modules.append(cache.load(path, source))
    assert len(caught) == 1
    assert [m.f() for m in modules] == [1, 2]
    assert inspect.getsource(modules[1].f) == "def f():\n    return 2\n"
    assert fault in ("a file in the way", "no such device") or not list(folder.iterdir())


def test_a_model_compiles_without_a_cache_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda name: str(tmp_path / "file"))
    torch.manual_seed(0)
    model = Block()
    x = torch.randn(2, 5, HIDDEN)
    with pytest.warns(UserWarning, match="kept in memory only") as caught:
        compiled: Any = moec.compile(model)
        ours = compiled(x)
        ours.sum().backward()
        with torch.no_grad():
            compiled(x)
    assert len(caught) == 1
    torch.testing.assert_close(ours, model(x))
    assert [region.status for region in moec.regions(compiled)] == ["compiled"]


def test_files_of_killed_writers_are_removed_when_old(tmp_path: Path) -> None:
    old, new = tmp_path / ".old.tmp", tmp_path / ".new.tmp"
    for path in (old, new):
        path.write_text("torn")
    os.utime(old, (0, 0))
    cache.store(SOURCE, "name", tmp_path)
    assert not old.exists() and new.exists()


@pytest.mark.parametrize("part", ["concurrent", "killed", "flipped"])
def test_stress(part: str) -> None:
    counts = ["--processes=3", "--rounds=20", "--kills=25", "--flips=40"]
    assert cache_stress.main([part, *counts]) == 0


def _reads_whole(folder: str) -> int:
    """How often a reader saw anything but the whole text."""
    wrong = 0
    for _ in range(20):
        path = cache.store(SOURCE, "kept", folder)
        wrong += path.read_text(encoding="utf-8") != SOURCE
    return wrong


def test_threads_that_write_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(_reads_whole, [str(tmp_path)] * 8)) == 0
    assert [p.suffix for p in tmp_path.iterdir()] == [".py"]


def test_loading_happens_once_and_whole(tmp_path: Path) -> None:
    text = "import time\ntime.sleep(0.05)\nVALUE = 7\nCOUNT = globals().get('COUNT', 0) + 1\n"
    path = cache.store(text, "slow", tmp_path)
    with ThreadPoolExecutor(4) as pool:
        modules = list(pool.map(cache.load, [path] * 4, [text] * 4))
    assert all(m is modules[0] for m in modules)
    assert all((m.VALUE, m.COUNT) == (7, 1) for m in modules)


def test_a_module_that_fails_to_load_is_forgotten(tmp_path: Path) -> None:
    source = "raise ValueError('broken')\n"
    path = cache.store(source, "broken", tmp_path)
    for _ in range(2):
        with pytest.raises(ValueError, match="broken"):
            cache.load(path, source)
    assert f"moec_emitted.{path.stem}" not in sys.modules


def test_default_folder_is_the_users_cache() -> None:
    assert cache.cache_directory().name == "emitted"
    assert cache.cache_directory("somewhere") == Path("somewhere")
