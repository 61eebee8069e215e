"""The exact rules of simplify, one by one."""

from __future__ import annotations

import pytest
import torch

from moec.interp import run
from moec.ir import Builder, Type, Value, dim, parse
from tests.graphs import (
    assert_same,
    passed,
)

T = dim("T")


SIMPLER = {
    "%y = t.reshape(%x) {shape=[T, 8]} : f32[T, 8]": [],
    "%a = t.reshape(%x) {shape=[8*T]} : f32[8*T]\n"
    "%y = t.reshape(%a) {shape=[T, 8]} : f32[T, 8]": [],
    "%a = t.neg(%x) : f32[T, 8]\n%y = t.neg(%a) : f32[T, 8]": [],
    '%a = t.cast(%x) {dtype="f64"} : f64[T, 8]\n%y = t.cast(%a) {dtype="f32"} : f32[T, 8]': [],
    '%a = t.cast(%x) {dtype="bf16"} : bf16[T, 8]\n%y = t.cast(%a) {dtype="f32"} : f32[T, 8]': [
        *("t.cast", "t.cast")
    ],
    "%y = t.mul(%x) {other=1.0} : f32[T, 8]": [],
    "%y = t.add(%x) {other=0.0} : f32[T, 8]": ["t.add"],
    "%a, %b = t.split(%x) {parts=2} : f32[T, 4], f32[T, 4]\n%y = t.merge(%a, %b) : f32[T, 8]": [],
    "%a, %b = t.split(%x) {parts=2} : f32[T, 4], f32[T, 4]\n%y = t.merge(%b, %a) : f32[T, 8]": [
        *("t.split", "t.merge")
    ],
    "%m = t.merge(%x, %x) : f32[T, 16]\n%y, %b = t.split(%m) {parts=2} : f32[T, 8], f32[T, 8]": [],
    '%m = t.merge(%x, %x) : f32[T, 16]\n%y, %b = t.split(%m) {layout="interleave", parts=2} '
    ": f32[T, 8], f32[T, 8]": ["t.merge", "t.split"],
    "%a = t.mul(%x, %v) : f32[T, 8]\n%b = t.mul(%a) {other=2.0} : f32[T, 8]\n"
    "%p, %q = t.split(%b) {parts=2} : f32[T, 4], f32[T, 4]\n%y = t.merge(%q, %p) : f32[T, 8]": [
        *("t.split", "t.split", "t.mul", "t.mul", "t.mul", "t.mul", "t.merge")
    ],
    "%a = t.mul(%x, %c) : f32[T, 8]\n%p, %q = t.split(%a) {parts=2} : f32[T, 4], f32[T, 4]\n"
    "%z = t.merge(%q, %p) : f32[T, 8]\n%y = t.add(%z, %a) : f32[T, 8]": [
        *("t.mul", "t.split", "t.merge", "t.add")  # the product has another reader
    ],
    "%r = moe.expert_rows(%w, %o) {rows=T} : f32[T, 8]\n"
    "%p, %q = t.split(%r) {parts=2} : f32[T, 4], f32[T, 4]\n%y = t.merge(%q, %p) : f32[T, 8]": [
        *("t.split", "moe.expert_rows", "moe.expert_rows", "t.merge")
    ],
    "%g = t.slice(%x) {dim=-1, start=0, stop=8, step=2} : f32[T, 4]\n"
    "%u = t.slice(%x) {dim=1, start=1, stop=8, step=2} : f32[T, 4]\n"
    "%y = t.merge(%u, %g) : f32[T, 8]": [
        "t.split",
        "t.merge",
    ],
    "%g = t.slice(%x) {dim=-1, start=0, stop=4} : f32[T, 4]\n"
    "%u = t.slice(%x) {dim=1, start=2, stop=6} : f32[T, 4]\n%y = t.merge(%u, %g) : f32[T, 8]": [
        *("t.slice", "t.slice", "t.merge")
    ],
}


@pytest.mark.parametrize("text", SIMPLER)
def test_simplifications_are_exact(text: str) -> None:
    graph = parse(
        "graph @g(%x: f32[T, 8], %v: f32[8], %c: f32[T, 1], %w: f32[2, 8], %o: i32[3]) {\n"
        + text
        + "\nreturn %y }"
    )
    after = passed("simplify, cse, dce", graph)
    assert [op.kind for op in after.ops] == SIMPLER[text]
    given = [torch.randn(5, 8), torch.randn(8), torch.randn(5, 1), torch.randn(2, 8)]
    given.append(torch.tensor([0, 2, 5], dtype=torch.int32))
    assert_same(run(after, given), run(graph, given), exact=True)


def test_many_splits_settle() -> None:
    """One round is enough for any number of slices: a deep model must not run out of rounds."""
    b = Builder()
    x = Value(Type("f32", (T, 8)), "x")
    y = x
    for _ in range(60):
        low, high = (b("t.slice", y, dim=-1, start=i, stop=i + 4) for i in (0, 4))
        y = b("t.merge", high, low)
    after = passed("simplify", b.graph("g", [x], [y]))
    assert {op.kind for op in after.ops} == {"t.split", "t.merge"}
