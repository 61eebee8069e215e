"""Printing and reading IR: what is shown reads back, and what cannot be read says where."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.errors import IRError, ParseError
from moec.ir import Builder, Graph, Location, Type, Value, dim, parse, parse_file, show, verify
from moec.ir.parser import MAX_DEPTH
from moec.manager import PassManager
from moec.pipeline import pipeline
from tests.graphs import GPT_OSS, OLMOE, build, random_block

ERROR = re.compile(r"\A<text>:(\d+):(\d+): .+\n  (.*)\n  ( *)\^\Z", re.DOTALL)
SAMPLE = """\
graph @sample(%x: f32[2*T, 4], %w: f32[4, 8]; %d: f32[2*T, 2]) where 0 <= T <= 64, 1 <= S {
  %y = t.matmul(%x, %w) : f32[2*T, 8]  // model.py:3 (layers.0)
  %a, %b = t.split(%y) {layout="concat", parts=2} : f32[2*T, 4], f32[2*T, 4]
  %c = t.add(%a) {other=-1.5e-03} : f32[2*T, 4]
  %z = t.full() {dtype="f32", shape=[2*T, 2], value=-inf} : f32[2*T, 2]
  %k = kern.pointwise(%c, %b) : f32[2*T, 4] [
    graph @inner(%p: f32[2*T, 4], %q: f32[2*T, 4]) {
      %r = t.mul(%p, %q) : f32[2*T, 4]
      return %r
    }
  ]
  return %z grad none, %w
}
"""


def assert_reads_back(graph: Graph) -> None:
    text = show(graph)
    again = parse(text)
    assert again == graph
    assert show(again) == text
    assert again.fingerprint == graph.fingerprint
    assert [op.loc for op in again.ops] == [op.loc for op in graph.ops]


@pytest.mark.parametrize("seed", range(20))
def test_random_graphs_read_back(seed: int) -> None:
    graph = random_block(seed).graph
    assert_reads_back(graph)
    fused = PassManager(pipeline("triton", training=seed % 2 == 0)).run(graph)
    assert_reads_back(fused)


def test_sample_reads_back() -> None:
    graph = parse(SAMPLE)
    assert show(parse(show(graph))) == show(graph)
    assert graph.ops[0].loc == Location("model.py", 3, "layers.0")
    assert graph.ops[1].loc is None
    assert graph.gradients == (None, graph.inputs[1])


def test_many_graphs_in_one_text() -> None:
    graphs = [build(OLMOE).graph, build(GPT_OSS).graph]
    assert parse_file(show(graphs)) == graphs
    assert parse_file("// nothing\n") == []


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text(max_size=8), min_size=1, max_size=5), st.text(max_size=12), st.text())
def test_any_names_read_back(hints: list[str], name: str, place: str) -> None:
    b = Builder()
    inputs = [Value(Type("f32", (dim("T"),)), hint) for hint in hints]
    b.loc = Location(place, 3, place)
    graph = b.graph(name, inputs, [b("t.neg", inputs[0], hint=hints[-1])])
    text = show(graph)
    assert parse(text) == graph
    assert show(parse(text), locations=False) == show(graph, locations=False)


@pytest.mark.parametrize("module", ["", "layers.0.mlp", "blocks(2).mlp"])
@pytest.mark.parametrize("file", ["model.py", "my models/moe 2.py", "<string>"])
def test_locations_read_back(file: str, module: str) -> None:
    b = Builder()
    x = Value(Type("f32", (2,)), "x")
    b.loc = Location(file, 12, module)
    assert_reads_back(b.graph("g", [x], [b("t.neg", x)]))


def assert_parse_error(text: str) -> str:
    """The error's message; its place must lie in the text, with a caret under it."""
    with pytest.raises(ParseError) as caught:
        parse_file(text)
    match = ERROR.match(str(caught.value))
    assert match is not None, str(caught.value)
    line, column, source, indent = match.groups()
    lines = text.split("\n")
    assert 1 <= int(line) <= len(lines)
    assert lines[int(line) - 1].startswith(source)
    assert len(indent) == min(int(column) - 1, 200)
    return str(caught.value)


TOKENS = [m.start() for m in re.finditer(r"[A-Za-z_0-9.]+|[^\sA-Za-z_0-9]", SAMPLE)]


def test_every_truncation_is_an_error() -> None:
    for offset in TOKENS[1:]:
        if SAMPLE[:offset].strip():
            assert_parse_error(SAMPLE[:offset])


def test_changed_tokens_are_read_or_refused() -> None:
    """A token dropped, doubled or replaced: text that is still IR is fine, all else is an error."""
    pieces = ["", "%x", "@g", "graph", "(", "]", "}", ",", "99999999999", '"s"', "-", "grad", "1.5"]
    for begin, end in zip(TOKENS, [*TOKENS[1:], len(SAMPLE)], strict=True):
        for piece in [*pieces, SAMPLE[begin:end] * 2]:
            text = SAMPLE[:begin] + piece + " " + SAMPLE[end:]
            try:
                graphs = parse_file(text)
            except ParseError:
                assert_parse_error(text)
            else:
                assert parse_file(show(graphs)) == graphs


@settings(deadline=None, max_examples=80)
@given(st.text(st.sampled_from('graph@%x(){}[]:;,=<=-+*^ \n"f32T0.5e/t.add'), max_size=60))
def test_noise_is_an_error(noise: str) -> None:
    text = "graph @g(" + noise
    try:
        parse_file(text)
    except ParseError:
        assert_parse_error(text)


def graph_of(line: str, result: str = "%y") -> str:
    return f"graph @g(%x: f32[T, 4], %i: i64[T, 4]) {{\n  {line}\n  return {result}\n}}\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("%y = t.nothing(%x) : f32[T, 4]", "unknown op 't.nothing'"),
        ("%y = x.neg(%x) : f32[T, 4]", "unknown op 'x.neg'"),
        ("%y = t.neg(%x) {by=1} : f32[T, 4]", "unknown attribute 'by'"),
        ("%y = t.softmax(%x) : f32[T, 4]", "missing attribute 'dim'"),
        ('%y = t.softmax(%x) {dim="0"} : f32[T, 4]', "attribute 'dim' is '0', no int"),
        ("%y = t.softmax(%x) {dim=true} : f32[T, 4]", "attribute 'dim' is True, no int"),
        ("%y = t.softmax(%x) {dim=1, dim=1} : f32[T, 4]", "given twice"),
        ("%y = t.softmax(%x) {dim=7} : f32[T, 4]", "axis 7"),
        ("%y = t.neg(%z) : f32[T, 4]", "%z is not defined before its use"),
        ("%x = t.neg(%x) : f32[T, 4]", "%x is defined twice"),
        ("%y = t.neg(%x) : f32[T, 5]", "gives f32[T, 4], not f32[T, 5]"),
        ("%y = t.neg(%x) : f31[T, 4]", "unknown dtype 'f31'"),
        ("%y = t.neg(%x) : f32[-1]", "negative size"),
        ("%y = t.neg(%x) : f32[T / 4]", "unexpected character"),
        ("%y = t.neg(%x) : f32[for]", "cannot read the dim"),
        ("%y = t.neg(%x) : f32[(T, 4]", "cannot read the dim"),
        ("%y = t.neg(%x, %x, %x) : f32[T, 4]", "t.neg"),
        ("%y = t.neg() : f32[T, 4]", "t.neg"),
        ("%y, %z = t.neg(%x) : f32[T, 4]", "names 2 results but gives 1 types"),
        ("%y = t.add(%x, %i) : f32[T, 4]", "different dtypes"),
        ("%y = t.split(%x) {parts=0} : f32[T, 4]", "no 0 equal parts"),
        ("%y = t.slice(%x) {dim=1, start=0, stop=9} : f32[T, 9]", "no slice"),
        ("%y = t.slice(%x) {dim=1, start=0, step=0, stop=2} : f32[T, 2]", "no slice"),
        ("%y = t.sum(%x) {dims=[]} : f32[T, 4]", "at least one axis"),
        ("%y = t.reshape(%x) {shape=[-1, -4]} : f32[T, 4]", "elements"),
        ("%y = t.full() {dtype=1, shape=[], value=0.0} : f32[]", "attribute 'dtype'"),
        ("%y = kern.pointwise(%x) : f32[T, 4]", "needs a body"),
        (f"%y = t.neg(%x) : f32[{'9' * 31}]", "more than 30 digits"),
        (f"%y = t.neg(%x) : f32[{'(' * 40}T{')' * 40}]", "nested"),
        (f"%y = t.sum(%x) {{dims={'[' * 40}{']' * 40}}} : f32[T]", "nested"),
        ('%y = t.cast(%x) {dtype="\\q"} : f32[T, 4]', "malformed string"),
        ("%y = t.neg(%x) : f32[T, 4] [graph @b() { return }]", "takes no body"),
    ],
)
def test_wrong_ops_are_refused(line: str, message: str) -> None:
    assert message in assert_parse_error(graph_of(line))


def test_wrong_ranges_are_refused() -> None:
    for ranges in ("5 <= T <= 4", "0 <= T, 0 <= T", "0 <= for", "T <= 4", "0 <= T <= "):
        assert_parse_error(f"graph @g(%x: f32[T]) where {ranges} {{ return %x }}")


def test_bodies_nest_only_so_deep() -> None:
    deep = "graph @g() {\n%y = kern.pointwise() : f32[] [\n" * (MAX_DEPTH + 2)
    assert f"more than {MAX_DEPTH} deep" in assert_parse_error(deep)


def test_a_comment_in_a_dim_is_no_division() -> None:
    graph = parse("graph @g(%x: f32[(T +  // half\n  4)]) { return %x }")
    assert graph.inputs[0].type == Type("f32", (dim("T") + 4,))
    assert_parse_error("graph @g(%x: f32[(T // 4\n)]) { %x }")


def _neg() -> Graph:
    return parse("graph @g(%x: f32[T]) {\n  %y = t.neg(%x) : f32[T]  // m.py:7\n  return %y\n}")


def test_verify_names_what_is_wrong() -> None:
    graph = _neg()
    (op,) = graph.ops
    other = Value(Type("f32", (3,)), "other")
    wrong = {
        "not defined before its use": graph.with_ops([replace(op, operands=(other,))]),
        "defined twice": graph.with_ops([op, op]),
        "declared f32[3]": graph.with_ops([replace(op, results=(other,))]),
        "never defined": replace(graph, outputs=(other,)),
        "one cotangent per float output": replace(graph, gradients=(None,)),
        "the cotangent of": replace(graph, gradients=(None,), cotangents=(other,)),
    }
    for message, broken in wrong.items():
        with pytest.raises(IRError, match=re.escape(message)) as caught:
            verify(broken, after="the-pass")
        assert "after pass the-pass" in str(caught.value)
    with pytest.raises(IRError, match="only moe ops may be left here"):
        verify(graph, dialects=("moe",))
    assert verify(graph) is graph


def test_verify_finds_dims_that_come_from_nowhere() -> None:
    b = Builder()
    full = b("t.full", value=0.0, dtype="f32", shape=(dim("Q"),))
    with pytest.raises(IRError, match="unknown dims Q"):
        verify(b.graph("g", [], [full]))
