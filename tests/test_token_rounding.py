"""Token rounding: the rule, against one written with lists; gradients; what it leaves alone."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import moec
from moec import interp
from moec.api import regions
from moec.errors import CompileError
from moec.ir import Builder, Graph, Type, Value, dim
from moec.ir.graph import walk
from moec.manager import PassManager
from moec.observers import Check
from moec.ops.token_rounding import round_tokens
from moec.pipeline import RAISE, pipeline
from moec.runtime.artifact import build as build_artifact
from moec.token_rounding import Effect, watch
from tests.graphs import MODELS, OLMOE, Options, build
from tests.models import build as build_model

NONE = float("inf")


def rounded_by_hand(
    index: torch.Tensor, choice: torch.Tensor, tile: int, groups: int = 1, rounds: int = 6
) -> torch.Tensor:
    """The rule in plain Python, one token and one expert at a time."""
    chosen, scores = index.tolist(), choice.double().tolist()
    experts = choice.shape[1]
    counts = [sum(row.count(e) for row in chosen) for e in range(experts)]
    by_rest = sorted(range(experts), key=lambda e: (-(counts[e] % tile), e))
    ups, stays = divmod(sum(c % tile for c in counts), tile)
    need = {e: tile - counts[e] % tile for e in by_rest[:ups]}
    give = {}
    for e in by_rest[ups:]:
        kept = min(stays, counts[e] % tile)
        give[e], stays = counts[e] % tile - kept, stays - kept
    for _ in range(rounds):
        offers = []
        for t, row in enumerate(chosen):
            of_groups = {e * groups // experts for e in row if e < experts}
            outs = [(scores[t][e], k) for k, e in enumerate(row) if give.get(e, 0) > 0]
            ins = [
                (-scores[t][f], f)
                for f in sorted(need)
                if need[f] > 0 and f not in row and f * groups // experts in of_groups
            ]
            if outs and ins:
                (out, k), (lost, f) = min(outs), min(ins)
                offers.append((torch.tensor(out).sub(-lost).item(), t, k, f))
        offers.sort()
        left = dict(give)
        let_go = []
        for offer in offers:
            e = chosen[offer[1]][offer[2]]
            if left[e] > 0:
                left[e] -= 1
                let_go.append(offer)
        for _, t, k, f in let_go:
            if need[f] > 0:
                need[f] -= 1
                give[chosen[t][k]] -= 1
                chosen[t][k] = f
    return torch.tensor(chosen, dtype=torch.int32).reshape(index.shape)


def routed(tokens: int, experts: int, choices: int, how: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores that float32 and float64 subtract alike, and the best experts of each token."""
    generator = torch.Generator().manual_seed(tokens + experts)
    steps = 8 if how == "ties" else 1 << 16
    scores = torch.randint(steps, (tokens, experts), generator=generator) / steps
    if how == "zipf":
        scores = scores - torch.arange(experts).float().log2().clamp(min=0).floor() / 8
    if how == "one":
        scores[:, :choices] += 4
    if how == "empty":
        scores[:, 0] -= 4
    order = scores.sort(dim=1, descending=True, stable=True).indices
    return order[:, :choices].int(), scores


CASES = [
    *itertools.product((0, 1, 7, 64, 301), [(8, 2), (16, 4)], ("random", "ties"), (4, 16)),
    *itertools.product((97,), [(8, 1), (5, 3)], ("zipf", "one", "empty"), (8,)),
    *itertools.product((50,), [(4, 4), (1, 1)], ("random",), (16,)),  # every token to every expert
]


@pytest.mark.parametrize(("tokens", "sizes", "how", "tile"), CASES)
def test_the_rule(tokens: int, sizes: tuple[int, int], how: str, tile: int) -> None:
    index, scores = routed(tokens, *sizes, how)
    after = round_tokens(index, scores, tile, 1, 6)
    assert after.dtype == torch.int32
    assert torch.equal(after, rounded_by_hand(index, scores, tile))
    assert torch.equal(after, round_tokens(index, scores, tile, 1, 6))
    assert all(len(set(row)) == sizes[1] for row in after.tolist())  # no expert twice
    effect = Effect(index, after, sizes[0], tile)
    assert effect.padded_after <= effect.padded_before
    if sizes[0] == sizes[1] or how == "one" or index.numel() < tile:
        assert effect.changed == 0  # nowhere to go, or nothing to fill


def test_groups_that_a_token_does_not_use_are_left_alone() -> None:
    index, scores = routed(203, 16, 3, "random")
    index[5:40, 1], index[7] = 16, 16  # places without an expert
    after = round_tokens(index, scores, 8, 4, 6)
    assert torch.equal(after, rounded_by_hand(index, scores, 8, 4))
    assert (after != index).any() and torch.equal(after == 16, index == 16)
    for before, now in zip(index.tolist(), after.tolist(), strict=True):
        assert {e // 4 for e in now if e < 16} <= {e // 4 for e in before}


def test_scores_that_are_no_numbers_move_nothing() -> None:
    index, scores = routed(64, 8, 2, "random")
    for odd in (torch.nan, -torch.inf, torch.inf):
        assert torch.equal(round_tokens(index, torch.full_like(scores, odd), 16, 1, 6), index)


def test_random_routing_fills_nearly_all_tiles_with_few_changes() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(4096, 32, generator=generator).softmax(-1)
    index = scores.topk(4).indices.int()
    effect = Effect(index, round_tokens(index, scores, 64, 1, 6), 32, 64)
    assert effect.padded_before > 600 and effect.padded_after == 0
    assert effect.changed < 0.02
    assert "4096 tokens, 4 of 32 experts each, tiles of 64: 1." in str(effect)
    lost = 1 - scores.gather(1, effect.after.long()).sum() / scores.gather(1, index.long()).sum()
    assert lost < 1e-3


def step(graph: Graph, folder: Any, data: list[torch.Tensor], dy: torch.Tensor) -> list[Any]:
    """Output and gradients of the training module for the CPU, tiles of 8."""
    manager = PassManager(pipeline("aten", True, token_rounding=8))
    artifact = build_artifact(manager.run(graph), "aten", "training", (), folder)
    leaves = [t.clone().requires_grad_() for t in data]
    (y,) = artifact(leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def plain_step(data: list[torch.Tensor], dy: torch.Tensor) -> list[Any]:
    """The same in plain PyTorch: a router, rounded by hand, and a loop over experts."""
    x, router, gate_up, down = leaves = [t.clone().requires_grad_() for t in data]
    scores = torch.nn.functional.linear(x, router).softmax(-1)
    index = rounded_by_hand(scores.topk(2).indices.int(), scores.detach(), 8).long()
    w = scores.gather(1, index)
    w = w / (w.sum(-1, keepdim=True) + 1e-20)
    y = torch.zeros_like(x)
    for e in range(router.shape[0]):
        token, place = (index == e).nonzero(as_tuple=True)
        gate, up = (x[token] @ gate_up[e].t()).chunk(2, -1)
        rows = (torch.nn.functional.silu(gate) * up) @ down[e].t()
        y = y.index_add(0, token, rows * w[token, place, None])
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize("tokens", [0, 1, 3, 61, 200])
def test_gradients_are_those_of_the_rounded_routing(tokens: int, tmp_path: Any) -> None:
    block = build(Options(norm="sum", hidden=16, inner=12, experts=8, choices=2))
    data = [t.float() for t in block.arguments(tokens)]
    dy = torch.randn(data[0].shape, generator=torch.Generator().manual_seed(1))
    with watch() as seen:
        actual = step(block.graph, tmp_path, data, dy)
    assert len(seen) == 1 and (seen[0].changed > 0) == (tokens > 3)
    for a, wanted in zip(actual, plain_step(data, dy), strict=True):
        assert (a - wanted).norm() <= 1e-5 * (wanted.norm() + 1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_the_pass_stands_behind_each_selection(name: str) -> None:
    graph = PassManager(f"{RAISE}, round-tokens{{tile=16}}").run(build(MODELS[name]).graph)
    (rounded,) = [op for op in graph.ops if op.kind == "moe.round_tokens"]
    assert rounded.attrs.get("groups", 1) == (4 if name == "deepseek_v3" else 1)
    readers = {op.kind for op in graph.ops if rounded.result in op.operands}
    assert readers == {"moe.dispatch", "moe.weight"}
    (select,) = [op for op in graph.ops if op.kind == "moe.select"]
    assert [op for op in graph.ops if select.result in op.operands] == [rounded]
    again = PassManager("round-tokens{tile=16}").run(graph)
    assert again is graph and PassManager("round-tokens").run(build(OLMOE).graph).ops


def test_a_check_of_passes_does_not_take_it_for_a_fault() -> None:
    text = f"{RAISE}, round-tokens{{tile=4}}, simplify, cse, dce"
    manager = PassManager(text, [Check({"T": 40})])
    block = build(OLMOE)
    after, data = manager.run(block.graph), block.arguments(40)
    assert not torch.equal(interp.run(after, data)[0], interp.run(block.graph, data)[0])


@pytest.mark.parametrize(
    "options", [Options(capacity=1.0), Options(mode="topk_per_group")], ids=str
)
def test_other_dispatches_stay_as_they_are(options: Options) -> None:
    graph = build(options).graph
    assert PassManager("round-tokens{tile=16}").run(graph) is graph
    x, index = Value(Type("f32", (dim("T"), 4)), "x"), Value(Type("i32", (dim("T"), 2)), "index")
    b = Builder()
    perm, _, inverse = b("moe.dispatch", index, experts=4, hint=("p", "o", "i"))
    given = b.graph("given", [x, index], [b("moe.gather", x, perm, inverse)])
    assert PassManager("round-tokens{tile=16}").run(given) is given


def test_a_model_is_rounded_in_training_alone() -> None:
    model, tokens = build_model("mixtral").train(), 3 + torch.arange(64)[None] % 40
    plain = moec.compile(model)
    fast = moec.compile(model, options={"token_rounding": 16})
    with torch.no_grad(), watch() as seen:
        assert torch.equal(fast(tokens).logits, plain(tokens).logits)
    assert not seen
    with watch() as seen:
        fast(tokens).logits.sum().backward()
    assert len(seen) == len(regions(fast)) and all(e.tile == 16 for e in seen)
    assert any(e.changed for e in seen)
    assert all(p.grad is not None for p in model.parameters())
    text = str(moec.explain(fast))
    assert (
        text.count("token rounding: %") == len(regions(fast)) and "fills tiles of 16 rows" in text
    )
    assert "token rounding" not in str(moec.explain(plain))
    (trained,) = {a for r in regions(fast) for a in r.artifacts if a.mode == "training"}
    assert any(op.kind == "moe.round_tokens" for op in walk(trained.graph))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token_rounding": True}, "a number of rows from 0"),
        ({"token_rounding": -1}, "got -1"),
        ({"token_rounding": "128"}, "such as 128, got '128'"),
        ({"token_rounding": 128, "numerics": "repro"}, "which 'numerics' 'repro' rules out"),
        ({"token_rounding": 128, "passes": "cse"}, "round-tokens{tile=128} between"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(CompileError, match=message):
        moec.compile(build_model("mixtral"), options=options)
