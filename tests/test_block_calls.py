"""Blocks that are called with more than tokens, or return more than one tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import moec
from moec.api import regions
from tests.contract import EXPERTS, HIDDEN, Block, assert_same

SIZES = ((2, 3), (1, 1), (1, 7), (5, 1), (3, 0))
VOCABULARY = 11


class Hashed(Block):
    """The token's number picks its experts."""

    table: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        table = torch.stack([torch.randperm(EXPERTS)[:2] for _ in range(VOCABULARY)])
        self.register_buffer("table", table)

    def forward(self, x: torch.Tensor, ids: Any = None) -> Any:
        flat = x.reshape(-1, HIDDEN)
        chosen = self.table[ids.reshape(-1)]
        weights = self.gate(flat).sigmoid().gather(1, chosen)
        return self.experts(flat, chosen, weights).view(x.shape)


class Stateful(Block):
    """Adds what the router of the layer before has found, and hands on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(6, HIDDEN, bias=False)
        self.next = nn.Linear(HIDDEN, 6)

    def forward(
        self, x: torch.Tensor, state: torch.Tensor | None = None, *, with_extra: bool = False
    ) -> Any:
        routed = x if state is None else x + self.mix(state)
        weights, chosen = self.route(routed)
        out = self.experts(x.reshape(-1, HIDDEN), chosen, weights).view(x.shape)
        return out, None, self.next(routed), chosen if with_extra else "none"


class ByBatch(Block):
    """Each sequence has a vector of its own that shifts the router's scores."""

    def forward(self, x: torch.Tensor, condition: Any = None, sharpness: float = 1.0) -> Any:
        scores = (self.gate(x) + condition[:, None, :]) * sharpness
        weights, chosen = scores.reshape(-1, EXPERTS).softmax(-1).topk(2)
        return self.experts(x.reshape(-1, HIDDEN), chosen, weights).view(x.shape)


def _ids(*size: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, size)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("training", [False, True])
def test_token_numbers_by_place_by_name_and_flat(size: tuple[int, int], training: bool) -> None:
    block = Hashed().train(training)
    compiled = moec.compile(block)
    x, ids = torch.randn(*size, HIDDEN), _ids(*size)
    assert_same(block, compiled, x, ids)
    assert_same(block, compiled, x, ids=ids)
    assert_same(block, compiled, ids=ids.reshape(-1), x=x)
    assert regions(compiled)[0].status == "compiled"


def test_one_capture_serves_all_sizes_and_a_table_that_changes() -> None:
    block = Hashed()
    compiled = moec.compile(block)
    for size in ((2, 3), (1, 1), (4, 9), (1, 5)):
        assert_same(block, compiled, torch.randn(*size, HIDDEN), _ids(*size))
    session = regions(compiled)[0].session
    served = [f for f in session.captures.values() if f.graph is not None and f.kind == "block"]
    assert len(served) == 1
    block.table.copy_((block.table + 1) % EXPERTS)
    assert_same(block, compiled, torch.randn(2, 3, HIDDEN), _ids(2, 3))
    block.table = block.table.flip(0).contiguous()
    assert_same(block, compiled, torch.randn(2, 3, HIDDEN), _ids(2, 3))


def test_a_call_that_was_not_seen_says_so_and_the_experts_are_compiled() -> None:
    found = moec.explain(Hashed()).regions[0]
    assert found.status == "experts only"
    assert "did not run on tokens" in found.reason


@pytest.mark.parametrize("size", SIZES)
def test_state_in_and_out_with_results_that_are_no_tensors(size: tuple[int, int]) -> None:
    block = Stateful()
    compiled = moec.compile(block)
    x, state = torch.randn(*size, HIDDEN), torch.randn(*size, 6)
    for arguments in ((x,), (x, None), (x, state)):
        assert_same(block, compiled, *arguments)
    result = compiled(x, state)
    assert isinstance(result, tuple)
    assert result[1] is None
    assert result[3] == "none"
    assert torch.equal(compiled(x, state, with_extra=True)[3], block(x, state, with_extra=True)[3])
    assert regions(compiled)[0].status == "compiled"


def test_none_that_is_the_default_needs_no_capture_of_its_own() -> None:
    compiled = moec.compile(Stateful())
    x = torch.randn(2, 3, HIDDEN)
    compiled(x, None)
    compiled(x, state=None, with_extra=False)
    assert len(regions(compiled)[0].found) == 1


@pytest.mark.parametrize("size", [(2, 3), (1, 1), (1, 7), (4, 4)])
def test_a_vector_a_sequence_and_numbers_that_are_part_of_the_code(size: tuple[int, int]) -> None:
    block = ByBatch()
    compiled = moec.compile(block)
    x, condition = torch.randn(*size, HIDDEN), torch.randn(size[0], EXPERTS)
    for sharpness in (1.0, 0.5):
        assert_same(block, compiled, x, condition, sharpness)
    assert regions(compiled)[0].status == "compiled"


def test_numbers_that_change_at_every_call_end_in_the_blocks_own_code() -> None:
    block = ByBatch()
    compiled = moec.compile(block)
    x, condition = torch.randn(2, 3, HIDDEN), torch.randn(2, EXPERTS)
    for step in range(12):
        assert_same(block, compiled, x, condition, 1.0 + step)
    found = regions(compiled)[0]
    assert len([f for f in found.found.values() if f.graph is not None]) <= 8


class Opaque(Block):
    """Takes an object."""

    def forward(self, x: torch.Tensor, cache: Any = None) -> Any:
        return super().forward(x) * (1 if cache is None else cache["scale"])


def test_other_objects_are_left_to_the_blocks_own_code() -> None:
    block = Opaque()
    compiled = moec.compile(block)
    x = torch.randn(2, 3, HIDDEN)
    torch.testing.assert_close(compiled(x, {"scale": 3}), block(x, {"scale": 3}))
    torch.testing.assert_close(compiled(x), block(x))
    assert regions(compiled)[0].status == "compiled"
    before = moec.compile(block)
    before(x, {"scale": 3})
    assert "its argument cache (dict)" in before._moec_region.unserved


class InPlace(Block):
    """Changes its tokens, as jitter in place does."""

    def forward(self, x: torch.Tensor) -> Any:
        x *= 2.0
        return super().forward(x)


def test_a_block_that_changes_its_tokens_in_place_still_does() -> None:
    block = InPlace()
    compiled = moec.compile(block)
    assert regions(compiled)[0].status == "experts only"
    assert "in place" in regions(compiled)[0].reason
    x = torch.randn(2, 3, HIDDEN)
    one, two = x.clone(), x.clone()
    torch.testing.assert_close(compiled(one), block(two))
    assert torch.equal(one, 2 * x)
    assert torch.equal(two, 2 * x)


def test_further_tensors_under_torch_compile() -> None:
    block = Hashed()
    compiled = moec.compile(block)
    options: dict[str, Any] = {"backend": "eager", "fullgraph": True, "dynamic": True}
    traced: Any = torch.compile(compiled, **options)
    stateful = Stateful()
    traced_state: Any = torch.compile(moec.compile(stateful), **options)
    for size in ((2, 3), (4, 7), (3, 5)):
        x, ids, state = torch.randn(*size, HIDDEN), _ids(*size), torch.randn(*size, 6)
        torch.testing.assert_close(traced(x, ids), block(x, ids))
        torch.testing.assert_close(traced(x, ids=ids), block(x, ids=ids))
        torch.testing.assert_close(traced_state(x, state)[::2], stateful(x, state)[::2])
        torch.testing.assert_close(traced_state(x)[::2], stateful(x)[::2])
