"""Model scope: the whole forward as one graph with the regions as ops, or region scope with a
reason.
"""

from __future__ import annotations

import copy
import json
import logging
from typing import Any

import pytest
import torch
from torch import nn

import moec
from moec.compiled import model_scope_of
from moec.errors import CompileError
from moec.model_scope import traced_once

from .models import assert_equal_gradients, build, gradients, relative_error, tokens


def whole(model: Any, **options: Any) -> Any:
    """Compiled in model scope; the captured graph runs as it is, which needs no C++ compiler."""
    settings = {"model_backend": "eager", **options}
    return moec.compile(model, scope="model", options=settings)


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def test_one_graph_serves_every_length() -> None:
    model = build("mixtral")
    compiled = whole(model)
    for length in (7, 33, 12):
        expected, reference = gradients(model, tokens(2, length))
        output, found = gradients(compiled, tokens(2, length))
        assert relative_error(output.logits, expected.logits) < 1e-5
        assert_equal_gradients(found, reference)
    scope = model_scope_of(compiled)
    assert scope is not None and scope.served == 3 and not scope.reason
    assert "scope: model" in str(moec.explain(compiled))


def test_generation_gives_the_same_tokens() -> None:
    model = build("mixtral")
    prompt = tokens(2, 6, labels=False)
    options = {"max_new_tokens": 3, "do_sample": False}
    expected = model.generate(**prompt, **options)
    assert torch.equal(whole(model).generate(**prompt, **options), expected)


class _Plain(nn.Module):
    """A block with a norm before it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = build("mixtral").model.layers[0].mlp
        self.norm = nn.LayerNorm(32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.inner(self.norm(x))
        return y


class _Branching(_Plain):
    """Looks at values between its layers, which no single graph can do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y if y.sum().item() > 0 else -y


def test_a_model_that_is_no_single_graph_runs_in_region_scope_and_says_why() -> None:
    model = _Branching()
    compiled = whole(model)
    x = torch.randn(2, 5, 32)
    with pytest.warns(UserWarning, match="region scope"):
        found = compiled(x)
    assert relative_error(found, model(x)) < 1e-5
    assert "scope: region, the whole graph could not be captured" in str(moec.explain(compiled))
    assert relative_error(compiled(x[:1]), model(x[:1])) < 1e-5


_LOGGER = logging.getLogger("telling")


class _Telling(nn.Module):
    """It tells a logger about its input, as models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _LOGGER.warning("rows: %s", x.shape[0])
        y: torch.Tensor = self.linear(x)
        return y


@pytest.mark.filterwarnings("ignore:moec. found no MoE block")
def test_what_is_told_to_a_logger_is_no_reason_against_one_graph() -> None:
    compiled = whole(_Telling())
    compiled(torch.randn(3, 4))
    scope = model_scope_of(compiled)
    assert scope is not None and scope.served == 1
    assert not torch._dynamo.config.ignore_logger_methods, "others' captures are as they were"


def test_strict_mode_raises_where_the_whole_cannot_be_captured() -> None:
    compiled = moec.compile(
        _Branching(), scope="model", strict=True, options={"model_backend": "eager"}
    )
    with pytest.raises(CompileError, match="could not be captured"):
        compiled(torch.randn(1, 3, 32))


def test_a_call_that_the_model_refuses_leaves_the_scope_as_it_was() -> None:
    compiled = whole(_Plain())
    with pytest.raises(RuntimeError):
        compiled(torch.randn(1, 4, 31))
    scope = model_scope_of(compiled)
    assert scope is not None and not scope.reason


def test_a_copy_has_a_scope_of_its_own() -> None:
    compiled, x = whole(_Plain()), torch.randn(2, 3, 32)
    twin = copy.deepcopy(compiled)
    scope = model_scope_of(twin)
    assert scope is not None and scope is not model_scope_of(compiled)
    assert torch.equal(twin(x), compiled(x))


def test_wrong_scopes_and_backends_are_refused() -> None:
    model = build("mixtral")
    with pytest.raises(CompileError, match="unknown scope 'module'"):
        moec.compile(model, scope="module")
    with pytest.raises(CompileError, match="knows no backend 'fast'"):
        moec.compile(model, scope="model", options={"model_backend": "fast"})
    with pytest.raises(CompileError, match="is for scope='model'"):
        moec.compile(model, options={"model_backend": "inductor"})
    with pytest.raises(CompileError, match="compiled already"):
        moec.compile(whole(model))


def test_what_dynamo_is_told_of_loggers_can_be_written() -> None:
    with traced_once():
        ignored = torch._dynamo.config.ignore_logger_methods
        assert logging.Logger.info in ignored
        assert any("Logger.info" in name for name in json.loads(json.dumps(sorted(ignored))))


def test_a_model_is_traced_once() -> None:
    """The floats in it (the eps of a norm) are constants, not symbols to be found constant."""
    traced = list[Any]()

    def backend(module: Any, inputs: Any) -> Any:
        traced.append(module)
        return torch._dynamo.lookup_backend("aot_eager")(module, inputs)

    torch._dynamo.register_backend(backend, name="counting")
    model = whole(build("mixtral"), model_backend="counting")
    model(**tokens(2, 5))
    assert len(traced) == 1
