"""Masks that a tracer's graph needs not, and those that it does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx
from transformers import MistralConfig, MistralForCausalLM

import moec
from moec.causal_masks import ATTENTION, with_causal_attention
from tests.models import build, tokens

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
Call = Callable[..., Any]


def seen(call: Call, *args: Any, dynamic: bool = True, **kwargs: Any) -> tuple[Any, fx.Graph]:
    """The result of a call compiled without masks, and the graph that gave it."""
    graphs = list[fx.Graph]()

    def backend(module: fx.GraphModule, _: Any) -> Call:
        made = with_causal_attention(module)
        made.graph.lint()
        graphs.append(made.graph)
        return made.forward

    result = torch.compile(call, backend=backend, dynamic=dynamic, fullgraph=True)(*args, **kwargs)
    return result, graphs[-1]


def masks(graph: fx.Graph) -> list[bool]:
    """Whether each attention reads a mask."""
    found = [n for n in graph.nodes if n.target is ATTENTION]
    given = [dict(enumerate(n.args)) | n.kwargs for n in found]
    has_mask = [(g.get("attn_mask") or g.get(3)) is not None for g in given]
    assert [g.get("is_causal", False) for g in given] == [not has for has in has_mask]
    return has_mask


def drawn(batch: int = 2, length: int = 9, keys: int | None = None) -> tuple[torch.Tensor, ...]:
    """Queries, keys, values [batch, 2, length, 4]."""
    torch.manual_seed(length)
    count = length if keys is None else keys
    return tuple(torch.randn(batch, 2, n, 4) for n in (length, count, count))


def attention(allow: Call) -> Call:
    """Attention with a mask of the indices of batch, query and key, all of one length."""

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(q.shape[2])[None, None, :, None]
        columns = torch.arange(k.shape[2])[None, None, None, :]
        mask = allow(rows, columns).expand(q.shape[0], 1, -1, -1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return call


@pytest.mark.parametrize("dynamic", [True, False])
def test_a_causal_mask_goes(dynamic: bool) -> None:
    call, (q, k, v) = attention(lambda row, column: column <= row), drawn()
    result, graph = seen(call, q, k, v, dynamic=dynamic)
    assert masks(graph) == [False]
    assert not any("arange" in str(n.target) for n in graph.nodes), "nor is it computed"
    torch.testing.assert_close(result, F.scaled_dot_product_attention(q, k, v, is_causal=True))


@pytest.mark.parametrize(
    "allow",
    [
        lambda row, column: column < row + 2,
        lambda row, column: column >= row,
        lambda row, column: (column <= row) & (column > row - 40),
        lambda row, column: (column <= row) & (column // 16 == row // 16),
        lambda row, column: (column <= row) & (column > row - 5000),
        lambda row, column: (column <= row) & ((column > row - 30) | (column < 4)),
    ],
    ids=["one more", "other side", "window", "chunks", "large window", "window and sinks"],
)
def test_other_masks_stay(allow: Call) -> None:
    data = drawn()
    result, graph = seen(attention(allow), *data)
    assert masks(graph) == [True]
    torch.testing.assert_close(result, attention(allow)(*data))


def test_a_mask_of_data_stays() -> None:
    data, kept = drawn(), torch.ones(9, dtype=torch.bool)

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kept: torch.Tensor) -> Any:
        mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril() & kept
        return F.scaled_dot_product_attention(q, k, v, mask)

    assert masks(seen(call, *data, kept)[1]) == [True]


def test_a_mask_for_more_keys_than_queries_stays() -> None:
    call = attention(lambda row, column: column <= row)
    assert masks(seen(call, *drawn(length=5, keys=9))[1]) == [True]


def test_a_mask_that_something_else_reads_stays_for_it() -> None:
    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, Any]:
        index = torch.arange(q.shape[2])
        mask = index[None] <= index[:, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask), mask.sum()

    (result, count), graph = seen(call, *(data := drawn()))
    assert masks(graph) == [False] and int(count) == 45
    torch.testing.assert_close(result, call(*data)[0])


def test_a_model_of_transformers_has_none() -> None:
    model = moec.compile(build("olmoe"))
    _, graph = seen(model, input_ids=tokens(2, 40)["input_ids"], use_cache=False)
    assert masks(graph) and not any(masks(graph))
    padding = torch.ones(2, 40, dtype=torch.int64)
    torch._dynamo.reset()
    _, graph = seen(
        model, input_ids=tokens(2, 40)["input_ids"], attention_mask=padding, use_cache=False
    )
    assert all(masks(graph))


def test_a_window_of_a_model_stays() -> None:
    config = MistralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, sliding_window=24, head_dim=16,
    )  # fmt: skip
    model = MistralForCausalLM(config)
    ids = torch.randint(64, (2, 12))  # shorter than the window: another call may be longer
    _, graph = seen(model, input_ids=ids, use_cache=False)
    assert all(masks(graph))


@pytest.mark.parametrize("budget", [None, "1GiB"])
def test_compiled_models_are_causal_at_every_length(budget: str | None) -> None:
    model = build("olmoe").train()
    compiled: Any = (
        moec.compile(model, scope="model", options={"model_backend": "aot_eager"})
        if budget is None
        else moec.compile(model, memory_budget=budget, options={"plan_seconds": 1})
    )
    for length in (40, 17, 1):
        inputs = {"input_ids": tokens(2, length)["input_ids"]}
        losses = []
        for run in (compiled, model):
            model.zero_grad()
            found = run(**inputs, use_cache=False).logits
            found.square().mean().backward()
            losses.append([found.detach(), *(p.grad for p in model.parameters())])
        for value, wanted in zip(*losses, strict=True):
            torch.testing.assert_close(value, wanted, rtol=1e-3, atol=1e-5)
