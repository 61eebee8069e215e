"""The store of emitted modules: whole or not there, and never anyone else's text."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from moec import cache
from moec.errors import CodegenError

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
    assert cache.load(path).VALUE == "é → ∑"


@pytest.mark.parametrize(
    "content",
    [
        SOURCE[: len(SOURCE) // 2].encode(),  # torn by a crash
        b"",
        b"\xff\xfe not text",
        SOURCE.replace("VALUE = 1", "VALUE = 9").encode(),  # another text of the same size
    ],
    ids=["torn", "empty", "binary", "foreign"],
)
def test_files_with_another_text_are_not_used(tmp_path: Path, content: bytes) -> None:
    path = cache.store(SOURCE, "other", tmp_path)
    path.write_bytes(content)
    assert cache.store(SOURCE, "other", tmp_path) == path
    assert path.read_text(encoding="utf-8") == SOURCE


def test_bytecode_of_another_text_is_not_used(tmp_path: Path) -> None:
    path = cache.store(SOURCE, "bytecode", tmp_path)
    foreign = SOURCE.replace("VALUE = 1", "VALUE = 9")
    path.write_text(foreign, encoding="utf-8")
    stamp = path.stat().st_mtime
    spec = importlib.util.spec_from_file_location("foreign_bytecode", path)
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))  # leaves its bytecode behind
    cache.store(SOURCE, "bytecode", tmp_path)
    os.utime(path, (stamp, stamp))  # size and time are all that bytecode is checked by
    assert cache.load(path).VALUE == 1


def test_a_folder_in_the_way_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CodegenError, match=r"cannot write the emitted module to .*file"):
        cache.store(SOURCE, "name", tmp_path / "file")


def test_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(handle: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(CodegenError, match="disk full"):
        cache.store(SOURCE, "name", tmp_path)
    assert not list(tmp_path.iterdir())


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


def test_processes_that_write_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_reads_whole, args=(str(tmp_path),)) for _ in range(2)]
    for worker in workers:
        worker.start()
    wrong = _reads_whole(str(tmp_path))
    for worker in workers:
        worker.join()
    assert wrong == 0
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert [p.suffix for p in tmp_path.iterdir()] == [".py"]


def test_loading_happens_once_and_whole(tmp_path: Path) -> None:
    text = "import time\ntime.sleep(0.05)\nVALUE = 7\nCOUNT = globals().get('COUNT', 0) + 1\n"
    path = cache.store(text, "slow", tmp_path)
    with ThreadPoolExecutor(4) as pool:
        modules = list(pool.map(cache.load, [path] * 4))
    assert all(m is modules[0] for m in modules)
    assert all((m.VALUE, m.COUNT) == (7, 1) for m in modules)


def test_a_module_that_fails_to_load_is_forgotten(tmp_path: Path) -> None:
    path = cache.store("raise ValueError('broken')\n", "broken", tmp_path)
    for _ in range(2):
        with pytest.raises(ValueError, match="broken"):
            cache.load(path)
    assert f"moec_emitted.{path.stem}" not in sys.modules


def test_default_folder_is_the_users_cache() -> None:
    assert cache.cache_directory().name == "emitted"
    assert cache.cache_directory("somewhere") == Path("somewhere")
