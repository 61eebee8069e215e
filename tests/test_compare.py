"""Graphs are compared by structure: names do not count, operands do."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from moec.cli.app import app
from moec.compare import Change, compare, is_same
from moec.ir.parser import parse
from moec.ir.text import show
from moec.manager import PassManager

from .graphs import random_block

FIRST = """graph @g(%x: f32[T, 4], %y: f32[T, 4]) {
  %a = t.add(%x, %y) : f32[T, 4]
  %b = t.mul(%a, %x) : f32[T, 4]
  %c = t.silu(%b) : f32[T, 4]
  return %c
}
"""


def changes(second: str) -> list[str]:
    return [str(line.change) for line in compare(parse(FIRST), parse(second))]


def test_names_and_places_do_not_count() -> None:
    renamed = FIRST.replace("%a", "%sum").replace("silu(%b)", "silu(%b)")
    assert changes(renamed) == ["same"] * 3
    assert is_same(parse(FIRST), parse(renamed))


def test_other_operands_are_seen() -> None:
    assert changes(FIRST.replace("mul(%a, %x)", "mul(%a, %y)")) == ["same", "rewired", "same"]


def test_a_new_op_is_one_line() -> None:
    more = FIRST.replace("  %c = t.silu(%b)", "  %n = t.neg(%b) : f32[T, 4]\n  %c = t.silu(%n)")
    assert changes(more) == ["same", "same", "added", "rewired"]


def test_another_attribute_or_kind_is_a_replacement() -> None:
    assert changes(FIRST.replace("silu", "relu")) == ["same", "same", "removed", "added"]


def test_another_returned_value_is_a_difference() -> None:
    other = FIRST.replace("return %c", "return %b")
    assert changes(other) == ["same"] * 3
    assert not is_same(parse(FIRST), parse(other))


@pytest.mark.parametrize("seed", range(8))
def test_every_op_is_there_once(seed: int) -> None:
    graph = random_block(seed).graph
    after = PassManager("simplify, raise-router, cse, dce, grad").run(graph)
    lines = compare(graph, after)
    assert [line.before for line in lines if line.before is not None] == list(graph.ops)
    assert [line.after for line in lines if line.after is not None] == list(after.ops)
    assert is_same(graph, parse(show(graph)))
    assert all((line.before is None) == (line.change is Change.ADDED) for line in lines)


def test_the_command_prints_differences_and_tells_by_its_exit_code(tmp_path: Path) -> None:
    (tmp_path / "a.moe").write_text(FIRST)
    (tmp_path / "b.moe").write_text(FIRST.replace("silu", "relu"))
    paths = [str(tmp_path / name) for name in ("a.moe", "b.moe")]
    result = CliRunner().invoke(app, ["diff", *paths])
    assert result.exit_code == 1
    assert "@g: 3 -> 3 ops (2 same, 1 removed, 1 added)" in result.stdout
    assert "- %c = t.silu(%b) : f32[T, 4]" in result.stdout
    assert "+ %c = t.relu(%b) : f32[T, 4]" in result.stdout
    same = CliRunner().invoke(app, ["diff", paths[0], paths[0]])
    assert same.exit_code == 0
    assert same.stdout == "@g: 3 -> 3 ops (3 same)\n"
