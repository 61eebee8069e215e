"""The size rules of docs/contributing.md, and that no debug leftovers are committed."""

import ast
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("moec", "passes", "codegen", "examples", "benchmarks")
FILES = sorted(
    path
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*.py")
    if not any(parent.is_symlink() for parent in path.parents)
)


def function_lengths(path: Path) -> list[int]:
    """Lines of each function, its decorators left out."""
    tree = ast.parse(path.read_text())
    functions = (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef))
    return [(f.end_lineno or f.lineno) - f.lineno + 1 for f in functions]


def test_the_median_function_has_at_most_ten_lines() -> None:
    lengths = [length for path in FILES for length in function_lengths(path)]
    assert len(lengths) > 500
    assert statistics.median(lengths) <= 10


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_has_at_most_450_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 450


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_markers_of_unfinished_work(path: Path) -> None:
    words = ("TO" + "DO", "FIX" + "ME", "XX" + "X", "breakpoint" + "(")
    assert not [word for word in words if word in path.read_text()]
