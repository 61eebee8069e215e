"""What single ops allocate as PyTorch expressions, against the rules about them."""

from pathlib import Path
from typing import Any

import pytest

from moec.inputs import random_inputs
from moec.ir import Builder, Graph, Type, Value, dim
from moec.memory import predict
from tests.memory_replay import built, tracked_step

pytestmark = pytest.mark.usefixtures("without_onednn")

T = dim("T")
A, E, H = 2 * T, 4, 48
FLOATS = ("f32", "bf16", "f16", "f64")
ROWS, TOKENS, PAIRS = (A, H), (T, H), (T, 2)
DISPATCHED = [("i32", (A,)), ("i32", PAIRS)]  # perm, inverse
OFFSETS = ("i32", (E + 1,))

# op, operands by dtype (none: the one of the case) and shape, attributes
CASES: list[tuple[str, list[Any], dict[str, Any]]] = [
    ("t.silu", [ROWS], {}),
    ("t.add", [ROWS], {"other": 1.0}),
    ("t.mul", [ROWS, (A, 1)], {}),
    ("t.log_sigmoid", [ROWS], {}),
    ("t.pow", [ROWS], {"exponent": 3.0}),
    ("t.where", [("bool", ROWS), ROWS, ROWS], {}),
    ("t.ge", [ROWS], {"other": 0.0}),
    ("t.cast", [ROWS], {"dtype": "f32"}),
    ("t.sum", [ROWS], {"dims": (-1,), "keepdim": True}),
    ("t.sum", [ROWS], {"dims": (0,)}),
    ("t.sum", [("i32", ROWS)], {"dims": (-1,)}),
    ("t.mean", [ROWS], {"dims": (-1,)}),
    ("t.amax", [ROWS], {"dims": (-1,)}),
    ("t.logsumexp", [ROWS], {"dims": (-1,)}),
    ("t.softmax", [ROWS], {"dim": -1}),
    ("t.norm", [ROWS], {"dim": -1}),
    ("t.cumsum", [ROWS], {"dim": 0}),
    ("t.cumsum", [("i32", ROWS)], {"dim": 0}),
    ("t.sort", [ROWS], {"dim": -1}),
    ("t.topk", [ROWS], {"k": 5}),
    ("t.one_hot", [("i64", PAIRS)], {"classes": E}),
    ("t.quotient", [("i64", ROWS)], {"other": 3, "mode": "floor"}),
    ("t.remainder", [("i64", ROWS)], {"other": 3}),
    ("t.take", [TOKENS, ("i64", (A,))], {}),
    ("t.take", [TOKENS, ("i32", PAIRS)], {}),
    ("t.index_add", [TOKENS, ("i64", (A,)), ROWS], {}),
    ("t.gather", [TOKENS, ("i32", PAIRS)], {"dim": -1}),
    ("t.scatter_add", [TOKENS, ("i32", PAIRS), PAIRS], {"dim": -1}),
    ("t.linear", [TOKENS, (E, H)], {}),
    ("t.linear", [TOKENS, (E, H), (E,)], {}),
    ("t.linear", [(2, T, H), (E, H)], {}),
    ("t.matmul", [(T, H), (H, E)], {}),
    ("t.matmul", [(E, T, H), (E, H, 8)], {}),
    ("t.matmul", [(T, H), (E, H, 8)], {}),
    ("t.matmul", [(3, E, T, H), (E, H, 8)], {}),
    ("t.concat", [TOKENS, ROWS], {"dim": 0}),
    ("t.stack", [TOKENS, TOKENS], {}),
    ("t.merge", [TOKENS, TOKENS], {"layout": "interleave"}),
    ("t.split", [TOKENS], {"parts": 2}),
    ("t.slice", [TOKENS], {"dim": 1, "start": 3, "stop": 9}),
    ("t.unslice", [(T, 6)], {"dim": 1, "start": 3, "stop": 9, "size": H}),
    ("t.reshape", [TOKENS], {"shape": (T, 2, H // 2)}),
    ("t.expand", [(T, 1)], {"shape": TOKENS}),
    ("t.backward", [ROWS, ROWS], {"of": "log_sigmoid"}),
    ("t.backward", [ROWS, ROWS], {"of": "softmax", "dim": -1}),
    ("moe.activate", [(T, E)], {"fn": "sqrtsoftplus"}),
    ("moe.activate", [(T, E)], {"fn": "softmax", "groups": 2}),
    ("moe.select", [(T, E), (E,)], {"k": 2}),
    ("moe.select", [(T, 8)], {"k": 2, "mode": "group_limited", "groups": 4, "topk_groups": 2}),
    ("moe.select", [(T, E)], {"k": 2, "mode": "margin", "theta": 0.1}),
    ("moe.weight", [(T, E), ("i32", PAIRS)], {"source": "softmax", "norm": "sum"}),
    ("moe.weight", [(T, E), ("i32", PAIRS)], {"norm": "clamp_min", "eps": 0.1, "scale": 2.0}),
    ("moe.limit", [("i32", PAIRS)], {"experts": E, "capacity": 3}),
    ("moe.round_tokens", [("i32", PAIRS), (T, E)], {"tile": 16}),
    ("moe.round_tokens", [("i32", (T, 6)), (T, 64)], {"tile": 16, "groups": 4}),
    ("moe.one_group", [], {"rows": T}),
    ("moe.dispatch", [("i32", PAIRS)], {"experts": E}),
    ("moe.gather", [TOKENS, *DISPATCHED], {}),
    ("moe.permute", [PAIRS, *DISPATCHED], {}),
    ("moe.unpermute", [(A,), *DISPATCHED], {}),
    ("moe.combine", [ROWS, *DISPATCHED], {}),
    ("moe.combine", [ROWS, *DISPATCHED, PAIRS], {}),
    ("moe.combine", [ROWS, *DISPATCHED, PAIRS], {"dtype": "f32"}),
    ("moe.row_scale", [ROWS, (A, 1)], {}),
    ("moe.row_scale", [ROWS, ("f32", (A, 1))], {}),
    ("moe.row_dot", [ROWS, ROWS], {"dtype": "f32"}),
    ("moe.grouped_mm", [ROWS, (E, 8, H), OFFSETS], {}),
    ("moe.grouped_outer", [ROWS, ROWS, OFFSETS], {}),
    ("moe.expert_rows", [(E, H), OFFSETS], {"rows": A}),
    ("moe.group_sum", [ROWS, OFFSETS], {}),
]


def alone(kind: str, operands: list[Any], attrs: dict[str, Any], dtype: str) -> Graph:
    """A graph of one op; a first input has the number of tokens."""
    types = [Type(*o) if isinstance(o[0], str) else Type(dtype, o) for o in operands]
    values = [Value(t, f"v{i}") for i, t in enumerate(types)]
    b = Builder({"T": (0, None)})
    made = b(kind, *values, **attrs)
    results = [made] if isinstance(made, Value) else list(made)
    return b.graph("one", [Value(Type("f32", (T,)), "tokens"), *values], results)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("kind", "operands", "attrs"), CASES, ids=lambda c: str(c)[:40])
def test_an_op_allocates_at_most_what_is_predicted(
    kind: str, operands: list[Any], attrs: dict[str, Any], dtype: str, tmp_path: Path
) -> None:
    graph = alone(kind, operands, attrs, dtype)
    predicted, compiled = predict(graph, "aten"), built(graph, "aten", tmp_path)
    for tokens in (0, 1, 33, 400):
        real = tracked_step(compiled, random_inputs(graph, {"T": tokens})).peak(64)
        assert real <= predicted.step.at(T=tokens), tokens
