"""The option ``numerics``: what is taken, what is refused where, and what the pipeline says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import moec
from moec.api import regions
from moec.codegen.triton import TritonEmitter
from moec.errors import CompileError
from moec.manager import PassManager
from moec.pipeline import pipeline
from tests.graphs import MODELS, build
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
