"""``moec plan MODEL``: peaks as polynomials, what fits, and one message for each mistake."""

import json
import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from moec.byte_sizes import parse_bytes
from moec.capture.model_spec import load
from moec.cli import app
from moec.errors import PlanError
from moec.ir import parse
from moec.manager import PassManager
from moec.memory import predict
from moec.pipeline import pipeline
from tests.test_cli import BLOCK, TINY


def run(*words: str) -> Result:
    return CliRunner().invoke(app, ["plan", *words])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model's configuration and a file of IR text."""
    monkeypatch.chdir(tmp_path)
    Path("config.json").write_text(json.dumps(TINY))
    Path("block.moe").write_text(BLOCK)
    return tmp_path


@pytest.mark.parametrize("target", ["triton", "aten"])
def test_a_file_s_blocks_are_shown_as_the_library_predicts(folder: Path, target: str) -> None:
    shown = run("block.moe", "--training", "--target", target, "--tokens", "64").output
    graph = PassManager(pipeline(target, True, descriptors=True)).run(parse(BLOCK))
    found = predict(graph, target)
    assert found.held is not None
    for name, peak in (("held between", found.held), ("step", found.step)):
        for piece in peak.pieces:
            assert f"{piece.expression} bytes" in shown
        assert f"{name}: " in shown
    assert "at the peak, T = 64, in the" in shown


def test_what_fits_is_the_last_size_that_does(folder: Path) -> None:
    shown = run("block.moe", "--fits", "100KiB").output
    found = predict(PassManager(pipeline("triton", False, descriptors=True)).run(parse(BLOCK)))
    match = re.search(r"100 KiB fit one block with up to (\d+) tokens", shown)
    assert match is not None
    tokens = int(match[1])
    assert found.step.at(T=tokens) <= 100 * 1024 < found.step.at(T=tokens + 1)
    assert "fit one block with no token" in run("block.moe", "--fits", "5B").output
    all_fit = run("block.moe", "--fits", "1GiB").output
    assert "with up to 4096 tokens, the end of their range" in all_fit


def test_sizes_beyond_the_range_are_not_shown(folder: Path) -> None:
    shown = run("block.moe").output
    assert "T = 4096" in shown and "65536" not in shown


def test_a_model_is_counted_with_all_its_blocks(folder: Path) -> None:
    shown = run("config.json", "--training", "--dtype", "bf16", "--fits", "1GiB").output
    assert "@MixtralSparseMoeBlock: model.layers.0.mlp and 1 equal" in shown
    assert "bf16[" in shown and "the model: 2 blocks" in shown
    assert "not counted: attention" in shown
    assert re.search(r"1.0 GiB fit the model with up to \d+ tokens", shown)


def test_a_model_that_is_built_in_part_is_counted_whole(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moec.capture.model_spec.MEMORY_LIMIT", 1000)
    shown = run("config.json").output
    assert "model.layers.0.mlp and 1 equal" in shown and "the model: 2 blocks" in shown


def test_a_dtype_is_that_of_all_weights(folder: Path) -> None:
    loaded = load("config.json", torch.bfloat16)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}


def test_a_graph_with_kernels_is_taken_as_it_is(folder: Path) -> None:
    CliRunner().invoke(app, ["opt", "block.moe", "-o", "fused.moe"])
    again = run("fused.moe", "-p", "").output
    assert run("fused.moe").output == again and "= kern." in again


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["block.moe", "--dtype", "bf16"], 2, "--dtype is for models"),
        (["config.json", "--dtype", "int4"], 2, "use one of f64, f32, bf16, f16"),
        (["block.moe", "--fits", "much"], 2, "--fits: 'much' is no size"),
        (["block.moe", "--fits", "3XB"], 2, "unknown unit 'XB'"),
        (["block.moe", "T:3"], 2, "'T:3' is no size"),
        (["graph.json", "--budget", "1", "--fits", "1GiB"], 2, "are for models, not --budget"),
        (["absent.moe"], 1, "No such file"),
        (["list.json"], 1, "to plan a graph of operations, give --budget"),
    ],
)
def test_mistakes_have_one_message(folder: Path, words: list[str], code: int, message: str) -> None:
    Path("list.json").write_text("[]")
    result = run(*words)
    assert result.exit_code == code
    assert message in " ".join(result.output.split())


def test_blocks_with_several_dims_ask_for_sizes(folder: Path) -> None:
    text = "graph @g(%x: f32[B, S]) { %y = t.exp(%x) : f32[B, S]  return %y }"
    Path("two.moe").write_text(text)
    assert "the dims B, S; give sizes of all but one" in run("two.moe").output
    assert "4096*B" in run("two.moe", "S=1024", "--target", "aten").output


@pytest.mark.parametrize(
    ("text", "size"),
    [("123", 123), ("40GiB", 40 << 30), ("1.5 GB", 1_500_000_000), ("2tib", 2 << 40)],
)
def test_sizes_are_read_as_users_write_them(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "1.2.3", "-5", "80%"])
def test_what_is_no_size_is_an_error(text: str) -> None:
    with pytest.raises(PlanError):
        parse_bytes(text)
