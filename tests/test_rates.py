"""Rates of a device: files of them, what is measured, and what times are modelled from them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count
from typer.testing import CliRunner

import moec
from moec.budget.calibrate import Shapes, calibrated, experts_graph, jobs, shapes_of
from moec.budget.rates import GROUPED, PRODUCTS, RATES, WORK, Rates
from moec.budget.rates_file import (
    GUESSED,
    Calibration,
    calibration_for,
    calibration_on,
    device_name,
    parse_calibration,
    show_calibration,
)
from moec.budget.work import dtype_of, work_of
from moec.cli import app
from moec.errors import CompileError, ParseError
from moec.tuning.file import versions

from .test_budget import step_of

CPU = torch.device("cpu")
aten: Any = torch.ops.aten
HERE = Calibration(
    device_name(CPU),
    "cpu",
    versions(),
    "2026-11-23",
    Rates({"f32": 2e10, "bf16": 1e9}, {"f32": 1e10}, {"f32": 3e10}, {}, 1e10, 2e-6),
)
TINY = Shapes([1 << 12], [8, 16], [4, 8], [0, 1, 8], 4, 2, 16, 8)


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


# files
def test_a_file_reads_back() -> None:
    for made in (HERE, *GUESSED.values()):
        assert parse_calibration(show_calibration(made), "a.json") == made


def damaged() -> Iterator[tuple[str, int]]:
    """Texts that are no files of rates, and the lines where they go wrong."""
    text = show_calibration(HERE)
    yield "", 1
    yield "[]", 1
    yield text[:-4], text.count("\n") - 1
    last = text.count("\n") - 1
    for old, new, line in (
        ("moec-rates/1", "moec-rates/2", 1),
        ('"kind": "cpu"', '"kind": []', 1),
        ('"kind": "cpu"', '"kind": "tpu"', 1),
        ('"date": "2026-11-23"', '"date": 5', 1),
        ('"rates": {', '"rates": 7, "other": {', 7),
        ('"f32": 20000000000.0', '"f32": NaN', 8),
        ('"f32": 20000000000.0', '"f32": -1', 8),
        ('"f32": 20000000000.0', '"f32": 0', 8),
        ('"f32": 20000000000.0', '"f32": true', 8),
        ('"f32": 20000000000.0', '"f32": 1e40', 8),
        ('"f32": 20000000000.0', f'"f32": 1{"0" * 390}', 8),
        ('"f32": 20000000000.0', '"f8": 2', 8),
        ('"bytes": 10000000000.0', '"bytes": Infinity', 7),
        ('"launch": 2e-06', '"launch": 60', 7),
        ('"launch": 2e-06', '"launch": "none"', 7),
    ):
        assert old in text and line < last
        yield text.replace(old, new), line


@pytest.mark.parametrize("text, line", list(damaged()))
def test_damage_has_a_place_and_the_guesses_are_used(text: str, line: int, tmp_path: Path) -> None:
    with pytest.raises(ParseError, match=rf"^a\.json:{line}:\d+: "):
        parse_calibration(text, "a.json")
    path, said = tmp_path / "a.json", list[str]()
    path.write_text(text)
    assert calibration_on(CPU, str(path), said.append) is GUESSED["cpu"]
    (words,) = said
    assert "a.json:" in words and words.endswith("modelled from moec's own guesses at rates")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"device": "another"}, "measured on another, this is"),
        ({"kind": "cuda"}, "measured on a GPU"),
        ({"versions": {"torch": "1.0"}}, "measured with torch 1.0, this is"),
        ({"versions": {}}, "measured with torch unknown"),
    ],
)
def test_what_was_measured_elsewhere_is_refused(
    change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    path, said = tmp_path / "a.json", list[str]()
    path.write_text(show_calibration(replace(HERE, **change)))
    assert calibration_on(CPU, str(path), said.append) is GUESSED["cpu"]
    assert len(said) == 1 and words in said[0]
    assert calibration_on(CPU, str(tmp_path / "none.json"), said.append) is GUESSED["cpu"]
    assert "No such file" in said[1]


def test_a_plan_for_a_device_elsewhere_takes_any_of_its_kind(tmp_path: Path) -> None:
    path, said = tmp_path / "a.json", list[str]()
    path.write_text(show_calibration(replace(HERE, kind="cuda", device="a GPU", versions={})))
    assert calibration_for("cuda", str(path), said.append).device == "a GPU" and not said
    assert calibration_for("cpu", str(path), said.append) is GUESSED["cpu"]
    assert "the plan is for a CPU" in said[0]


# measuring
def test_all_rates_are_measured_and_the_file_reads_back() -> None:
    done, complaints = list[str](), list[str]()
    found = calibrated(CPU, 2.0, done.append, complaints.append, TINY)
    assert not complaints and done == [str(job) for job in jobs(CPU, TINY)]
    rates = found.rates
    assert rates.bytes > 0 and 0 <= rates.launch < 1
    assert set(rates.products) == {"bf16", "f32", "f16", "f64"}
    assert all(set(getattr(rates, k)) == {"bf16", "f32", "f16"} for k in WORK if k != PRODUCTS)
    assert parse_calibration(show_calibration(found), "a.json") == found


def test_where_no_time_is_left_there_is_what_plans_need() -> None:
    complaints = list[str]()
    found = calibrated(CPU, 0.0, str, complaints.append, TINY)
    assert list(found.rates.products) == ["bf16"] and not found.rates.grouped
    assert "grouped f32 is not measured: no time is left" in complaints
    assert found.rates.of(GROUPED, "f32") == found.rates.products["bf16"]


def test_the_command_writes_a_file_for_this_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moec.budget.calibrate.shapes_of", lambda device: TINY)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = tmp_path / "rates.json"
    result = CliRunner().invoke(app, ["calibrate", "--seconds", "1", "-o", str(path)])
    assert result.exit_code == 0, result.output
    assert "GB/s" in result.output and "attention_backward" in result.output
    assert calibration_on(CPU, str(path), pytest.fail).device == device_name(CPU)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_shapes_are_those_of_a_graph(device: str) -> None:
    shapes = shapes_of(torch.device(device))
    graph = experts_graph("bf16", shapes)
    assert max(shapes.tokens) <= 65536 and len(graph.inputs) == 3


# what times are modelled from
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("heads", [4, 2], ids=["all heads", "shared keys"])
def test_attention_counts_on_every_device(heads: int, is_causal: bool) -> None:
    query = torch.empty(2, 4, 6, 8, dtype=torch.bfloat16, device="meta")
    key, value = (torch.empty(2, heads, 5, 8, device="meta").bfloat16() for _ in range(2))
    shapes = [t.shape for t in (query, key.expand(2, heads, 5, 8), value)]
    shapes = [shapes[0], *[torch.Size([2, 4, 5, 8])] * 2]
    share = 2 if is_causal else 1
    kernels = (
        (aten._scaled_dot_product_flash_attention_for_cpu.default, (0.0, is_causal)),
        (aten._scaled_dot_product_flash_attention.default, (0.0, is_causal)),
        (aten._scaled_dot_product_efficient_attention.default, (None, True, 0.0, is_causal)),
    )
    for target, rest in kernels:
        work = work_of(target, (query, key, value, *rest), {}, None)
        assert work is not None and (work.kind, work.dtype) == ("attention", "bf16")
        assert work.flops == sdpa_flop_count(*shapes) / share  # type: ignore[no-untyped-call]
    target = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    given = (query, query, key, value, query, query, 0.0, is_causal)
    work = work_of(target, given, {}, None)
    assert work is not None and work.kind == "attention_backward"
    assert work.flops == sdpa_backward_flop_count(shapes[0], *shapes) / share  # type: ignore[no-untyped-call]


def test_products_have_the_rate_of_their_dtype() -> None:
    left = torch.empty(0, 8, dtype=torch.float64, device="meta")
    right = torch.empty(8, 3, dtype=torch.float64, device="meta")
    work = work_of(aten.mm.default, (left, right), {}, left @ right)
    assert work is not None and (work.kind, work.dtype, work.flops) == (PRODUCTS, "f64", 0)
    assert work_of(aten.add.Tensor, (left, left), {}, left) is None
    assert dtype_of([torch.empty(3, dtype=torch.int64), 2]) == "f32"
    rates = RATES["cuda"]
    assert rates.of(PRODUCTS, "f64") < rates.of(PRODUCTS, "bf16") == rates.of(GROUPED, "bf16")


@pytest.mark.filterwarnings("ignore:moec. found no MoE block")
def test_a_budget_takes_its_times_from_a_file(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(5, 16)
    slow = replace(HERE, rates=replace(HERE.rates, launch=0.5))
    path = tmp_path / "slow.json"
    path.write_text(show_calibration(slow))

    def least_time(**options: Any) -> float:
        torch._dynamo.reset()
        compiled: Any = moec.compile(model, memory_budget="1GiB", options=options)
        compiled(x).sum().backward()
        found: float = step_of(compiled).planned.problem.least_time
        return found

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*rates.*")
        assert least_time() < 0.1 < 2 < least_time(rates=path)
    path.write_text(show_calibration(replace(slow, device="another")))
    with pytest.warns(UserWarning, match="measured on another") as seen:
        assert least_time(rates=str(path)) < 0.1
    assert sum("measured on another" in str(w.message) for w in seen) == 1


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"memory_budget": "1GiB", "options": {"rates": 5}}, "'rates' is the path of a file"),
        ({"options": {"rates": "a.json"}}, "goes with memory_budget"),
        ({"memory_budget": "1GiB", "options": {"count_others": 1}}, "'count_others' is true"),
    ],
)
def test_wrong_options_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CompileError, match=message):
        moec.compile(nn.Linear(4, 4), **settings)
