"""Compiled regions in exported programs and under tracers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx

import moec
from tests.models import assert_equal_gradients, build, gradients, pair, relative_error, tokens

pytestmark = pytest.mark.filterwarnings("ignore")  # tracers warn about their own internals
FAMILIES = ["olmoe", "deepseek_v3", "gpt_oss"]
SIZES = [(3, 17), (1, 33), (2, 1), (1, 1)]


def regions_in(graph: torch.fx.Graph) -> list[str]:
    """The ops of compiled regions in a traced graph."""
    return [str(n.target) for n in graph.nodes if str(n.target).startswith("moec.region")]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_region_is_one_op_of_an_exported_program(family: str) -> None:
    model, compiled = pair(family)
    axes = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    shapes = {"input_ids": axes, "attention_mask": axes, "use_cache": None}
    arguments = {**tokens(2, 7, labels=False), "use_cache": False}
    with torch.no_grad():
        program = torch.export.export(compiled, (), arguments, dynamic_shapes=shapes, strict=False)
        assert len(regions_in(program.graph)) == 2
        run = program.module()
        for batch, length in SIZES:
            arguments = {**tokens(batch, length, labels=False), "use_cache": False}
            found, expected = run(**arguments), model(**arguments)
            assert relative_error(found.logits, expected.logits) <= 1e-5


def test_an_exported_program_can_be_trained() -> None:
    model, compiled = pair("olmoe")
    block, reference = compiled.model.layers[0].mlp, model.model.layers[0].mlp
    program = torch.export.export(
        block, (torch.randn(2, 5, 32),), dynamic_shapes=({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},)
    )
    x = torch.randn(3, 9, 32)
    found = program.module()
    for each in (found, reference):
        each.zero_grad()
        each(x).square().sum().backward()
    ours, theirs = (
        {n: p.grad for n, p in each.named_parameters() if p.grad is not None}
        for each in (found, reference)
    )
    assert_equal_gradients(ours, theirs)


def test_make_fx_writes_one_op_down() -> None:
    model, compiled = pair("olmoe")
    block = compiled.model.layers[0].mlp
    with torch.no_grad():
        traced = make_fx(lambda x: block(x))(torch.randn(2, 5, 32))
        assert len(regions_in(traced.graph)) == 1
        x = torch.randn(2, 5, 32)  # other tokens go to other experts
        torch.testing.assert_close(traced(x), model.model.layers[0].mlp(x))


def test_fake_tensors_go_through() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    _, compiled = pair("olmoe")
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        found = compiled.model.layers[0].mlp(torch.empty(2, 5, 32))
    assert found.shape == (2, 5, 32)


def test_one_graph_for_every_length() -> None:
    torch._dynamo.reset()
    model, compiled = build("gpt_oss"), moec.compile(build("gpt_oss"), strict=True)
    call: Any = torch.compile(compiled, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (9, 2, 33, 64):
        # The sliding window of an attention cache is what would specialise here.
        arguments: dict[str, Any] = {**tokens(2, length), "use_cache": False}
        with torch._dynamo.config.patch(error_on_recompile=length != 9):
            output = call(**arguments)
        compiled.zero_grad()
        output.loss.backward()
        found = {n: p.grad for n, p in compiled.named_parameters() if p.grad is not None}
        wanted, theirs = gradients(model, arguments)
        assert relative_error(output.logits, wanted.logits) <= 1e-5
        assert_equal_gradients(found, theirs, 1e-4)
    torch._dynamo.reset()


def test_the_backend_takes_a_compiled_model() -> None:
    torch._dynamo.reset()
    model, compiled = pair("olmoe")
    block, reference = compiled.model.layers[0].mlp, model.model.layers[0].mlp
    call: Any = torch.compile(block, backend="moec", fullgraph=True, dynamic=True)
    for length in (9, 2, 64):
        x = torch.randn(2, length, 32)
        with torch._dynamo.config.patch(error_on_recompile=length != 9):
            torch.testing.assert_close(call(x), reference(x), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()
