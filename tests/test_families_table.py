"""The table of families in docs/support.md: complete, and true for a sample."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moec import docs
from moec.families import table
from moec.families.discover import EXPERT_FIELDS, families, field_names
from moec.families.row import Row, row_of
from moec.families.tiny import tiny_config

PAGE = Path(__file__).resolve().parents[1] / "docs" / "support.md"
# One for each way to build a model: text, a backbone inside another family, encoder and decoder.
SAMPLE = ("deepseek_v3", "gpt_oss", "internvl", "mixtral")


def test_every_family_has_a_row() -> None:
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    names = [line.split("|")[1].strip() for line in lines[1:] if "---" not in line]
    assert names == [family.name for family in families()]
    assert len(names) >= 77


def test_every_row_equals_eager() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")][1:]
    assert not [row for row in rows if "---" not in row and row.split("|")[3].strip() != "yes"]


@pytest.mark.parametrize("name", SAMPLE)
def test_rows_of_a_sample_are_true(name: str) -> None:
    (family,) = table.chosen([name])
    assert table.line(row_of(family)) in PAGE.read_text().splitlines()


def test_a_wrong_result_is_seen() -> None:
    from moec.families import row

    (family,) = table.chosen(["mixtral"])
    model: Any = row.tiny_model(family)
    other: Any = row.tiny_model(family)
    assert row.comparison(model, other) == "yes"
    other.model.layers[0].mlp.experts.down_proj.data.mul_(1.003)
    assert row.comparison(model, other).startswith("no: output differs by")


def test_a_wrong_gradient_is_seen() -> None:
    from moec.families import row

    (family,) = table.chosen(["mixtral"])
    model: Any = row.tiny_model(family)
    other: Any = row.tiny_model(family)
    other.model.layers[1].mlp.experts.down_proj.register_hook(lambda g: g * 1.01)
    assert row.comparison(model, other) == (
        "no: the gradient of model.layers.1.mlp.experts.down_proj differs"
    )


def test_tiny_configurations_have_few_experts() -> None:
    for name in SAMPLE:
        (family,) = table.chosen([name])
        text = tiny_config(family).get_text_config()
        counts = [getattr(text, n) for n in EXPERT_FIELDS & field_names(type(text))]
        assert counts and all(count == 8 for count in counts)


def test_a_page_reads_back_row_by_row() -> None:
    rows = [Row(n, "router", "experts", "compiled", "yes", "") for n in ("one", "two")]
    text = table.page(rows)
    assert "2 families: 2 compiled. Different from eager: none." in text
    changed = Row("two", "router", "experts", "experts only", "yes", "a | b")
    lines = table.with_rows(text, [changed]).splitlines()
    assert table.line(changed) in lines and table.line(rows[0]) in lines
    assert "2 families: 1 compiled, 1 experts only." in "\n".join(lines)
    assert table.rows_in("\n".join(lines)) == [rows[0], changed]


def test_the_command_says_which_row_is_stale(tmp_path: Path, capsys: Any) -> None:
    stale = Row("mixtral", "none", "none", "left as it was", "yes", "")
    (tmp_path / "support.md").write_text(table.page([stale]))
    arguments = ["support", "--only", "mixtral", "--folder", str(tmp_path)]
    assert docs.main([*arguments, "--check"]) == 1
    assert "the row of mixtral is stale" in capsys.readouterr().out
    assert docs.main(arguments) == 0
    assert docs.main([*arguments, "--check"]) == 0


def test_an_unknown_family_is_named() -> None:
    command = [sys.executable, "-m", "moec.docs", "support", "--only", "nothing"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PAGE.parents[1])
    assert done.returncode == 2
    assert "no family: nothing" in done.stderr
