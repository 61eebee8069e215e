"""The option ``numerics``: what is taken, what is refused where, and what the pipeline says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import moec
from moec.api import regions
from moec.codegen.triton import TritonEmitter
from moec.errors import CompileError, InvarianceError
from moec.manager import PassManager
from moec.pipeline import pipeline
from moec.runtime.artifact import Artifact
from moec.session import Session
from tests.graphs import MODELS, Options, build
from tests.models import build as build_model


@pytest.mark.parametrize(
    ("options", "target", "message"),
    [
        ({"numerics": "exact"}, None, "'numerics' is 'default' or 'repro', got 'exact'"),
        ({"numerics": ["repro"]}, None, "'numerics' is 'default' or 'repro'"),
        ({"numerics": "repro"}, "aten", "needs the target triton. The target asked for is aten"),
        ({"numerics": "repro", "passes": "cse"}, None, "put batch-invariant before the fuse"),
    ],
    ids=["unknown", "no text", "aten", "passes"],
)
def test_what_cannot_be_is_refused(
    options: dict[str, Any], target: str | None, message: str
) -> None:
    with pytest.raises(CompileError, match=message):
        moec.compile(build_model("olmoe"), target=target, options=options)


def test_without_a_gpu_the_first_call_says_what_it_needs() -> None:
    compiled = moec.compile(build_model("olmoe"), options={"numerics": "repro"})
    with pytest.raises(CompileError, match=r"mlp: .*needs the target triton. The target on cpu is"):
        compiled(torch.tensor([[1, 2, 3]]))
    assert "numerics: repro" in str(moec.explain(compiled))
    assert not regions(compiled)[0].artifacts


def test_the_default_changes_nothing() -> None:
    torch.manual_seed(0)
    model, tokens = build_model("olmoe"), torch.tensor([[1, 2, 3]])
    compiled = moec.compile(model, options={"numerics": "default"})
    assert torch.equal(compiled(tokens).logits, moec.compile(model)(tokens).logits)
    assert "numerics" not in str(moec.explain(compiled))


def test_the_pipeline_says_it_and_the_graph_keeps_it() -> None:
    """So that text written after a pass is emitted with the same promise."""
    text = pipeline("triton", True, repro=True)
    assert "batch-invariant" in text and text.endswith("repro=true}")
    assert "repro" not in pipeline("triton", True)
    lowered = PassManager(text).run(build(MODELS["deepseek_v3"]).graph)
    kernels = [op for op in lowered.ops if op.kind.startswith("kern.")]
    assert kernels and all(op.attrs["numerics"] == "repro" for op in kernels)
    assert TritonEmitter(moec.ir.parse(moec.ir.show(lowered))).repro


def test_only_products_of_tokens_become_products_of_one_group() -> None:
    block = build(MODELS["deepseek_v3"]).graph
    before = "simplify, cse, dce, raise-router, grad, simplify, cse, dce"
    joint = PassManager(before).run(block)
    changed = PassManager("batch-invariant").run(joint)
    dense = [op for op in changed.ops if op.kind in ("t.linear", "t.matmul")]
    assert dense and all(isinstance(op.result.type.elements, int) for op in dense)
    assert PassManager("batch-invariant").run(changed) is changed


def compiled_for_triton(
    options: Options, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Artifact | None:
    """What a session makes of a block where the target is triton; nothing is launched."""
    monkeypatch.setattr("moec.session.choose_target", lambda asked, device: "triton")
    session = Session(cache=str(folder), numerics="repro")
    return session.artifact(build(options).graph, None, torch.device("cpu"))


def test_a_session_has_one_artifact_for_all_numbers_of_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = compiled_for_triton(MODELS["deepseek_v3"], tmp_path, monkeypatch)
    assert made is not None and made.few is None
    assert "F.linear" not in made.path.read_text()


def test_a_block_that_mixes_tokens_is_an_error_and_no_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InvarianceError, match="which tokens an expert still takes"):
        compiled_for_triton(Options(capacity=1.0), tmp_path, monkeypatch)
    assert not list(tmp_path.rglob("*.moe"))
