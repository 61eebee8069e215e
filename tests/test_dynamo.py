"""Regions inside torch.compile, and the Dynamo backend."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import moec
from moec.dynamo import backend
from moec.errors import CompileError
from tests.models import build, tokens

pytestmark = pytest.mark.filterwarnings("ignore")  # Dynamo warns about its own internals


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """No memory of other tests' graphs."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def step(model: nn.Module, call: Any, length: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits and gradients of one step."""
    model.zero_grad()
    output = call(**tokens(2, length))
    output.loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return output.logits.detach(), gradients


def assert_equal_steps(model: nn.Module, call: Any, reference: nn.Module, length: int) -> None:
    """The same logits and gradients as the reference."""
    logits, gradients = step(model, call, length)
    expected, wanted = step(reference, reference, length)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():
        error = (gradients[name] - gradient).norm() / gradient.norm().clamp(min=1e-6)
        assert error < 1e-4, name


def test_a_compiled_model_is_one_graph_for_every_length() -> None:
    reference, model = build("olmoe"), build("olmoe")
    compiled = moec.compile(model)
    graphs = []

    def count(module: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(module)
        return torch._dynamo.lookup_backend("aot_eager")(module, inputs)

    call = torch.compile(compiled, backend=count, fullgraph=True, dynamic=True)
    assert_equal_steps(compiled, call, reference, 9)
    first = len(graphs)  # Dynamo may start over within the first call
    for length in (6, 33):
        assert_equal_steps(compiled, call, reference, length)
    assert len(graphs) == first
    names = [str(n.target) for n in graphs[-1].graph.nodes if "moec" in str(n.target)]
    assert len(names) == 2  # one op a block
    assert {region.status for region in moec.regions(compiled)} == {"compiled"}


def test_autocast_inside_torch_compile_is_the_callers() -> None:
    reference, model = build("olmoe"), build("olmoe")
    compiled = moec.compile(model)
    call: Any = torch.compile(compiled, backend="aot_eager", fullgraph=True, dynamic=True)
    arguments = tokens(2, 9, labels=False)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected, found = reference(**arguments).logits, call(**arguments).logits
    assert found.dtype == expected.dtype
    error = (found.float() - expected.float()).norm() / expected.float().norm()
    assert error < 0.05
    assert {region.status for region in moec.regions(compiled)} == {"compiled"}


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_the_backend_replaces_grouped_products(family: str) -> None:
    reference = build(family)
    model = build(family, experts_implementation="grouped_mm")
    seen: list[str] = []

    def spy(module: torch.fx.GraphModule, inputs: Any) -> Any:
        compiled = backend(module, inputs)
        seen.extend(str(n.target) for n in module.graph.nodes)
        return compiled

    call = torch.compile(model, backend=spy, fullgraph=True, dynamic=True)
    for length in (9, 5):
        assert_equal_steps(model, call, reference, length)
    assert any("moec" in name for name in seen)
    assert not any("grouped_mm" in name for name in seen)


def test_the_backend_is_found_by_name() -> None:
    assert "moec" in torch._dynamo.list_backends()
    linear = torch.compile(nn.Linear(4, 4), backend="moec")
    assert linear(torch.ones(2, 4)).shape == (2, 4)


def test_unknown_options_of_the_backend_are_refused() -> None:
    module = torch.fx.symbolic_trace(nn.Linear(4, 4))
    with pytest.raises(CompileError, match="no option 'speed'"):
        backend(module, [torch.ones(2, 4)], options={"speed": 11})
