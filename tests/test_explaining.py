"""What passes did and nearly did, with reasons; what a kernel is made of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moec import reasons
from moec.cli.app import app
from moec.errors import CodegenError
from moec.explaining import PassReport, explain_kernels, explain_passes, find_kernels
from moec.ir import Graph, parse
from moec.pipeline import pipeline
from tests.test_cli import TINY
from tests.test_observers import BLOCK

TAIL = """
  %chosen = t.cast(%idx) {dtype="i32"} : i32[T, 2]  // m.py:9 (gate)
  %perm, %offsets, %inverse = moe.dispatch(%chosen) {experts=4} : i32[2*T], i32[5], i32[T, 2]
  %rows = moe.gather(%x, %perm, %inverse) : f32[2*T, 8]
  %y = moe.combine(%rows, %perm, %inverse, %weights) : f32[T, 8]
  return %y
}
"""
HEAD = """graph @router(%x: f32[T, 8], %w: f32[4, 8], %bias: f32[T, 4]) {
  %logits = t.linear(%x, %w) : f32[T, 4]
"""
SOFTMAX = "  %scores = t.softmax(%logits) {dim=-1} : f32[T, 4]\n"
TOP = "  %weights, %idx = t.topk(%scores) {dim=-1, k=2} : f32[T, 2], i64[T, 2]"
PICKED = TOP.replace("%weights", "%picked") + "\n"
ROUTERS = {
    "select-from-topk: it takes the smallest": SOFTMAX + TOP.replace("k=2", "k=2, largest=false"),
    "selection-bias: neither term is one number": (
        "  %scores = t.add(%logits, %bias) : f32[T, 4]\n" + TOP
    ),
    "score-activation: t.relu makes the scores": "  %scores = t.relu(%logits) : f32[T, 4]\n" + TOP,
    "weight-normalised: its divisor %total: f32[T, 1] sums other values": (
        SOFTMAX
        + PICKED
        + "  %total = t.sum(%scores) {dims=[-1], keepdim=true} : f32[T, 1]\n"
        + "  %weights = t.div(%picked, %total) : f32[T, 2]"
    ),
    "weight-scaled: it is no product with a constant": (
        SOFTMAX + PICKED + "  %weights = t.mul(%picked, %picked) : f32[T, 2]"
    ),
    "limit-groups: what takes the place of left-out scores is no constant": (
        "  %mask = t.gt(%bias) {other=0.0} : bool[T, 4]\n"
        "  %scores = t.where(%mask, %bias, %logits) : f32[T, 4]\n" + TOP
    ),
}


def reports_of(graph: Graph, passes: str) -> dict[str, PassReport]:
    """The last report of each pass."""
    return {r.step.call.definition.name: r for r in explain_passes(graph, passes)}


def declined(report: PassReport) -> list[str]:
    return [f"{note.rule}: {note.reason}" for note in report.declined]


@pytest.mark.parametrize("reason", ROUTERS)
def test_a_router_that_is_nearly_one_has_a_reason(reason: str) -> None:
    graph = parse(HEAD + ROUTERS[reason] + TAIL)
    report = reports_of(graph, "raise-router")["raise-router"]
    assert any(text.startswith(reason) for text in declined(report)), declined(report)
    assert "nearly fired:" in str(report)


def test_what_fires_in_a_later_round_was_not_declined() -> None:
    total = "  %total = t.sum(%picked) {dims=[-1], keepdim=true} : f32[T, 1]\n"
    weights = "  %weights = t.div(%picked, %total) : f32[T, 2]"
    graph = parse(HEAD + SOFTMAX + PICKED + total + weights + TAIL)
    report = reports_of(graph, "raise-router")["raise-router"]
    assert not report.declined
    rules = [note.rule for note in report.fired]
    assert rules == ["select-from-topk", "weight-normalised", "score-activation"]


def test_top_k_beside_a_router_is_named() -> None:
    graph = parse("""graph @beside(%x: f32[T, 8]) {
      %values, %idx = t.topk(%x) {dim=-1, k=2} : f32[T, 2], i64[T, 2]
      return %values
    }""")
    report = reports_of(graph, "raise-router")["raise-router"]
    assert declined(report) == ["select-from-topk: its indices reach no dispatch"]


def test_scattered_scores_that_may_repeat_are_named() -> None:
    graph = parse("""graph @dense(%x: f32[T, 4], %i: i64[T, 2], %s: f32[T, 2]) {
      %zeros = t.full() {dtype="f32", shape=[T, 4], value=0.0} : f32[T, 4]
      %scores = t.scatter(%zeros, %i, %s) {dim=1} : f32[T, 4]
      return %scores
    }""")
    (text,) = declined(reports_of(graph, "dispatch-dense")["dispatch-dense"])
    assert "come from no top-k" in text


def test_weights_that_are_no_low_rank_sum_are_named() -> None:
    graph = parse("""graph @lora(%x: f32[A, 8], %w: f32[4, 6, 8], %b: f32[4, 6, 7],
        %a: f32[4, 7, 8], %offsets: i32[5]) {
      %delta = t.matmul(%b, %a) : f32[4, 6, 8]
      %sum = t.add(%w, %delta) : f32[4, 6, 8]
      %y = moe.grouped_mm(%x, %sum, %offsets) : f32[A, 6]
      return %y
    }""")
    texts = declined(reports_of(graph, "split-low-rank")["split-low-rank"])
    assert texts == ["low-rank-term: its factors hold as many numbers as the product, or more"]


@pytest.mark.parametrize(
    ("passes", "name", "words"),
    [
        ("fuse-gemm{max-ops=3}", "fuse-gemm", "the kernel would have more ops than max-ops allows"),
        ("fuse-gemm", "fuse-gemm", reasons.OWN_KERNEL),
        ("fuse-routing", "fuse-routing", "is the dispatch alone: its indices come from t.cast"),
        ("raise-router, simplify, dce, fuse-routing{max-experts=2}", "fuse-routing", "registers"),
        ("fuse-gemm, lower{descriptors=true}", "lower", "template tma: "),
        ("fuse-gemm, lower", "lower", "template tma: descriptors are off"),
        ("grad, recompute", "recompute", "bytes: redoing moe.grouped_mm takes longer"),
        ("fuse-pointwise{min-ops=9}", "fuse-pointwise", "fewer than 9 such ops"),
    ],
)
def test_passes_say_why_not(passes: str, name: str, words: str) -> None:
    texts = declined(reports_of(parse(BLOCK), passes)[name])
    assert any(words in text for text in texts), texts


def test_adjoint_names_its_rules_and_what_it_left() -> None:
    report = reports_of(parse(BLOCK), "raise-router, grad, simplify, cse, dce, adjoint")["adjoint"]
    assert {n.rule for n in report.fired} >= {"dot-through-product", "scale-after-product"}


def test_adjoint_says_why_a_scale_stays() -> None:
    graph = parse("""graph @scaled(%x: f32[A, 8], %s: f32[A, 1], %w: f32[4, 6, 8], %offsets: i32[5];
        %d_y: f32[A, 6]) {
      %scaled = moe.row_scale(%x, %s) : f32[A, 8]
      %y = moe.grouped_mm(%scaled, %w, %offsets) : f32[A, 6]
      return %y grad none, none, none, none
    }""")
    (text,) = declined(reports_of(graph, "adjoint")["adjoint"])
    assert text.startswith("scale-after-product: the scaled rows come from no gather")


class Unreadable:
    """Something that must not be made into text."""

    def __format__(self, spec: str) -> str:
        raise RuntimeError("nobody listens")


def test_a_reason_is_not_worded_if_nobody_listens() -> None:
    op = parse(BLOCK).ops[0]
    reasons.decline("rule", op, "{}", Unreadable())
    reasons.fired("rule", op, "{}", Unreadable())
    with reasons.listening() as record:
        reasons.decline("rule", op, "braces {stay}")
    assert [n.reason for n in record.declined] == ["braces {stay}"]
    assert not reasons.is_listening()


# kernels
@pytest.mark.parametrize("training", [False, True])
def test_every_kernel_says_what_it_is(training: bool) -> None:
    reports = explain_passes(parse(BLOCK), pipeline("triton", training))
    kernels = explain_kernels(reports[-1].step.after, reports)
    up = next(k for k in kernels if "moe.gather" in str(k) and "t.silu" in str(k))
    text = str(up)
    assert "a Triton kernel, template pointer, tile [64, 16, 16, 4, 2]" in text
    assert "f32 has no 16-bit tensor cores" in text
    assert "template tma: descriptors are off" in text
    assert "stayed outside:\n" in text
    assert "FLOP, " in text and "at T=4096: " in text


def test_kernels_of_the_aten_target_are_blocks_of_rows() -> None:
    reports = explain_passes(parse(BLOCK), pipeline("aten", training=False))
    (kernel,) = explain_kernels(reports[-1].step.after, reports, "aten")
    assert kernel.name == "silu"
    assert "PyTorch expressions, on blocks of rows" in str(kernel)


def test_a_kernel_is_found_by_a_part_of_its_name() -> None:
    reports = explain_passes(parse(BLOCK), pipeline("triton", training=False))
    kernels = explain_kernels(reports[-1].step.after, reports)
    assert [k.name for k in find_kernels(kernels, "inner")] == ["moe_inner"]
    with pytest.raises(CodegenError, match="no kernel 'soup'; the kernels: moe_route, moe_inner"):
        find_kernels(kernels, "soup")


# the command
@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("block.moe").write_text(BLOCK)
    Path("config.json").write_text(json.dumps(TINY))


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["block.moe"], "kernels: moe_route, moe_inner, moe_out, moe_y"),
        (["block.moe", "--pass", "raise-router"], "select-from-topk: %picked, %idx = t.topk"),
        (["block.moe", "--kernel", "inner"], "moe_inner: kern.grouped_gemm"),
        (["block.moe", "--kernel", "all", "--training"], "kern.grouped_outer"),
        (["block.moe", "--region", "@block", "--target", "aten"], "kernels: silu"),
        (
            ["config.json", "--region", "model.layers.1.mlp", "--pass", "raise-router"],
            "and 1 equal",
        ),
    ],
)
@pytest.mark.usefixtures("here")
def test_the_command(words: list[str], wanted: str) -> None:
    found = CliRunner().invoke(app, ["explain", *words])
    assert found.exit_code == 0, found.output
    assert wanted in found.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pass", "grad"], "--pass grad: this pipeline does not run it"),
        (["--pass", "gard"], "unknown pass 'gard'"),
        (["--region", "mlp"], "no region 'mlp'; there are @block"),
        (["--kernel", "soup"], "no kernel 'soup'"),
    ],
)
@pytest.mark.usefixtures("here")
def test_the_command_explains_mistakes(words: list[str], message: str) -> None:
    found = CliRunner().invoke(app, ["explain", "block.moe", *words])
    assert found.exit_code == 1
    assert message in found.stderr
