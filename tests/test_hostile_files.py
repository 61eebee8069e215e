"""Hostile files: refused with line and column or read, in little time, and nothing else happens."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import moec
from moec.codegen import emit_module
from moec.errors import CodegenError, MoecError, ParseError
from moec.files import folder_inside, write_whole
from moec.fuzz import determinism, files
from moec.ir import Builder, Graph, Location, Type, Value, dim, parse, show
from moec.manager import PassManager, parse_pipeline
from moec.observers import Dump
from moec.reduce import source_of_test
from tests.bad_models import HIDDEN, Block

CORPUS = Path(__file__).parent / "corpus" / "hostile"
GRAPH = "graph @g(%x: f32[T, 4]) {\n  %y = t.neg(%x) : f32[T, 4]\n  return %y\n}\n"
CODE = '__import__("os").system("touch canary")'


def op(line: str) -> str:
    return f"graph @g(%x: f32[T, 4]) {{\n  {line}\n  return %y\n}}\n"


# files that are too large to keep
LARGE = {
    "lists-nested.moe": op(f"%y = t.sum(%x) {{dims={'[' * 20000}{']' * 20000}}} : f32[T]"),
    "graphs-nested.moe": "graph @g() {\n%y = kern.pointwise() : f32[] [\n" * 5000,
    "brackets-nested.moe": op(f"%y = t.neg(%x) : f32[{'(' * 20000}T{')' * 20000}]"),
    "huge-integer.moe": op(f"%y = t.neg(%x) : f32[1{'0' * 100000}]"),
    "huge-float.moe": op(f"%y = t.add(%x) {{other={'9' * 50000}.0}} : f32[T, 4]"),
    "million-dims.moe": f"graph @g(%x: f32[{'1, ' * 999999}1]) {{ return %x }}\n",
    "million-attributes.moe": op(f"%y = t.sum(%x) {{dims=[{'1,' * 999999}1]}} : f32[T]"),
    "many-dims.moe": "graph @g(%x0: f32["
    + ", ".join(f"A{i}*B{i} + Min(C{i}, {i}*T)" for i in range(3000))
    + "]) { return }\n",
    "many-ops.moe": "graph @g(%x: f32[T]) {\n"
    + "".join(f"  %x{i} = t.neg(%x) : f32[T]  // m.py:{i}\n" for i in range(2000))
    + "  return %x\n}\n",
    "same-name.moe": f"graph @g({', '.join(f'%x{i}: f32[T]' for i in range(5000))}) {{ return }}\n",
    "long-name.moe": GRAPH.replace("%y", "%" + "y" * 100000),
    "long-string.moe": op(f'%y = t.cast(%x) {{dtype="{"f" * 100000}"}} : f32[T, 4]'),
    "long-comment.moe": f"//{':1 (' * 250000}\n{GRAPH}",
    "long-run-line.moe": f"// run: cse{' ' * 60000}x\n{GRAPH}",
    "longer-run-line.moe": f"// run: cse{' ' * 1000000}x\n{GRAPH}",
    "fifty-megabytes.moe": "// x:1\n" * (50 * 1024 * 1024 // 7),
    "megabyte-of-comments.moe": "// x:1\n" * 150000 + GRAPH,
    "fifty-megabytes.json": "[" + "1, " * (50 * 1024 * 1024 // 3),
    "deep.json": "[" * 100000,
}
TAKEN = {
    *("bom.moe", "crlf.moe", "many-ops.moe", "same-name.moe", "long-comment.moe"),
    *("megabyte-of-comments.moe", "names-dunder.moe", "names-keywords.moe", "names-low-high.moe"),
    *("names-of-emitted-code.moe", "place-code.moe", "place-separators.moe", "place-quotes.moe"),
    *("place-path.moe", "run-line-empty.moe", "code.json", "architectures.json", "negative.json"),
    *("good.moe", "good.json"),
}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """What a process did that read the corpus, and the folder above the one it may write to."""
    top = tmp_path_factory.mktemp("hostile")
    folder = top / "files"
    shutil.copytree(CORPUS, folder)
    for name, text in LARGE.items():
        (folder / name).write_text(text)
    (folder / "endless.moe").symlink_to("/dev/zero")
    outside = top / "outside.txt"
    outside.write_text("mine")
    words = [sys.executable, "-m", "tests.hostile_reader", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(CORPUS.parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        words, env=environment, cwd=CORPUS.parents[2], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout), top


def test_reading_the_corpus_runs_and_writes_nothing_else(
    report: tuple[dict[str, Any], Path],
) -> None:
    data, top = report
    assert data["seen"] == []
    assert not list(top.rglob("canary*"))
    assert (top / "outside.txt").read_text() == "mine"
    assert sorted(p.name for p in top.iterdir()) == ["files", "outside.txt"]


def test_every_file_is_read_or_refused_with_its_place(report: tuple[dict[str, Any], Path]) -> None:
    results = report[0]["results"]
    assert len(results) > 80
    taken = {name for name, (words, _) in results.items() if words == "taken"}
    refused = {n: w for n, (w, _) in results.items() if n not in taken}
    assert {n: w for n, w in refused.items() if not files.PLACE.match(w)} == {}
    assert taken >= TAKEN, {n: refused.get(n, "")[:200] for n in TAKEN - taken}
    slow = {name: seconds for name, (_, seconds) in results.items() if seconds > 2.0}
    assert slow == {}


# names from models, which no grammar limits
NAMES = [
    'a"""\nimport os\n',
    "../../up",
    "/etc/passwd",
    "x\0y",
    "class",
    "__import__",
    "\u202e",
    "é",
]


@pytest.mark.parametrize("name", NAMES)
def test_names_from_models_are_neither_code_nor_paths(tmp_path: Path, name: str) -> None:
    b = Builder({"T": (0, 8)})
    x = Value(Type("f32", (dim("T"), 4)), name)
    b.loc = Location(f"{name}\r{CODE}\n{CODE}", 3, f"{name}\u2028{CODE}\x0c{CODE}")
    graph = b.graph(name, [x], [b("t.neg", x, hint=name)])
    assert parse(show(graph)) == graph
    PassManager("cse, dce", [Dump(folder_inside(tmp_path / "dumps", name, name))]).run(graph)
    assert [p.relative_to(tmp_path).parts[0] for p in tmp_path.rglob("*.moe")] == ["dumps"]
    test = source_of_test(graph, f'grad{{wanted="+{CODE}+"}}', show(graph), f'"""{CODE}')
    for text in (emit_module(graph, "aten"), emit_module(graph, "triton"), test):
        assert "system" not in _names_in(compile(text, "emitted.py", "exec"))


def _names_in(code: Any) -> set[str]:
    """Every name that a code object and those in it use."""
    inner = [_names_in(c) for c in code.co_consts if hasattr(c, "co_names")]
    return set(code.co_names).union(*inner)


def test_a_model_with_hostile_names_compiles_and_dumps_inside_its_folder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    inner = Block()
    model = nn.Sequential()
    model.add_module("/etc/up\n" + CODE.replace(".", "_"), inner)
    x = torch.randn(2, 3, HIDDEN)
    options = {"cache": str(tmp_path / "a" / "cache"), "dump": str(tmp_path / "a" / "dump")}
    torch.testing.assert_close(moec.compile(model, options=options)(x), model(x))
    assert list((tmp_path / "a" / "dump").rglob("*.moe"))
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    emitted = list((tmp_path / "a" / "cache").glob("*.py"))
    assert emitted
    for path in emitted:
        assert "__import__" not in _names_in(compile(path.read_text(), str(path), "exec"))


def test_dumps_do_not_follow_links(tmp_path: Path) -> None:
    outside, dump = tmp_path / "outside", tmp_path / "dump"
    outside.mkdir()
    dump.mkdir()
    (outside / "file").write_text("mine")
    (dump / "00-input.moe").symlink_to(outside / "file")
    (dump / "g").symlink_to(outside)
    PassManager("dce", [Dump(dump)]).run(parse(GRAPH))
    assert (outside / "file").read_text() == "mine"
    assert (dump / "00-input.moe").read_text().startswith("// 1 ops")
    with pytest.raises(MoecError, match="leads out of"):
        folder_inside(dump, "g")


@pytest.mark.parametrize("name", ["torch", "len", "F", "low"])
def test_a_dim_of_a_name_that_emitted_code_uses_is_refused(name: str) -> None:
    with pytest.raises(CodegenError, match=f"uses the name '{name}' itself"):
        emit_module(parse(GRAPH.replace("T", name)), "aten")


def test_values_called_as_dims_and_loops_keep_their_meaning() -> None:
    text = GRAPH.replace("T", "N").replace("%x", "%N").replace("%y", "%low")
    space: dict[str, Any] = {}
    exec(emit_module(PassManager("fuse-rows").run(parse(text)), "aten"), space)
    x = torch.randn(3, 4)
    torch.testing.assert_close(space["forward"](x)[0][0], -x)


@pytest.mark.parametrize(
    ("text", "place"),
    [("cse, csse", "passes:1:6: "), ("cse,\n  dce # x\n, dce{a=1}", "passes:3:3: ")],
)
def test_pipelines_are_refused_with_their_place(text: str, place: str) -> None:
    with pytest.raises(MoecError, match=f"^{place}"):
        parse_pipeline(text)


def test_output_to_a_device_does_not_replace_it(tmp_path: Path) -> None:
    from moec.cli.console import write_result

    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_result("text", pipe)
    assert os.read(reader, 10) == b"text"
    os.close(reader)
    assert not pipe.is_file()


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        write_whole(tmp_path / "missing" / "file", b"")
    assert caught.value.filename == str(tmp_path / "missing" / "file")


def test_terminal_codes_are_not_repeated() -> None:
    with pytest.raises(ParseError) as caught:
        parse("graph @g() { \x1b[2J }", "a\x1bb")
    assert str(caught.value).replace("\n", "").isprintable()


def test_mutated_files(capfd: pytest.CaptureFixture[str]) -> None:
    """A fixed share of what ``python -m moec.fuzz.files`` tries."""
    code = files.main(["--count", "2000", "--seed", "3"])
    assert code == 0, capfd.readouterr().out


def test_seeds_are_graphs() -> None:
    graphs: list[Graph] = [parse(path.read_text()) for path in files.SEEDS.glob("*.moe")]
    assert len(graphs) > 30
    assert any(g.cotangents for g in graphs)
    assert any(o.kind.startswith("kern.") for g in graphs for o in g.ops)


def test_processes_with_other_hash_seeds_make_the_same() -> None:
    assert determinism.differences(["tests.bad_models:Block"], 3) == []


@pytest.mark.parametrize("target", ["aten", "triton"])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_size_that_no_tensor_has_is_refused(where: str, target: str) -> None:
    b, x, dy = (
        Builder({"T": (0, 64)}),
        Value(Type("f32", (4,)), "x"),
        Value(Type("f32", (4,)), "dy"),
    )
    full = b("t.full", dtype="f32", shape=[dim("T"), 4], value=1.0)
    sums = b("t.sum", full, dims=[0])
    if where == "forward":
        graph = b.graph("sizes", [x], [b("t.mul", x, sums)])
    else:
        y, dx = b("t.neg", x), b("t.mul", dy, sums)
        graph = dataclasses.replace(b.graph("sizes", [x], [y]), cotangents=(dy,), gradients=(dx,))
    with pytest.raises(CodegenError, match=f"{where} needs the size 'T'"):
        emit_module(graph, target)
