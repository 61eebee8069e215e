"""Sizes that a user declares for inputs: what they say of regions, and what is refused."""

from __future__ import annotations

import copy
import inspect
import logging
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.decorators import mark_dynamic, mark_unbacked
from typer.testing import CliRunner

import moec
from moec.api import regions
from moec.cli import app
from moec.cli.dims import read_dims
from moec.declared import declare
from moec.declared_limits import token_limits
from moec.errors import CallError, CompileError, DimError
from moec.ir.parser import parse
from moec.runtime.captured import Captures
from tests.bad_models import HIDDEN, Loop, Stacked
from tests.models import FAMILIES

B, S = moec.dim("B", max=8), moec.dim("S", min=1, max=64)


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.no_grad():
        yield


class Net(nn.Module):
    """Two blocks; the second has its tokens twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = Loop(), Loop()

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None, flat: Any = None) -> Any:
        y = x + self.first(x)
        y = y if mask is None else y * mask[..., None]
        return y + self.second(torch.cat([y, y], 1))[:, : y.shape[1]]


def tokens(*lead: int) -> torch.Tensor:
    return torch.randn(*lead, HIDDEN, generator=torch.Generator().manual_seed(lead[0]))


def high(region: Any, mode: int = -1) -> int | None:
    top: int | None = region.artifacts[mode].graph.ranges["T"][1]
    return top


# What a declaration is.


def test_arithmetic_of_dims() -> None:
    assert str(B * S + 1) == "B*S + 1"
    assert repr(2 * S - 1) == "<dim 2*S - 1: 1 <= S <= 64>"
    assert str((B * S) // 4) == "floordiv(B*S, 4)"
    assert (1 + S) == (S + 1)
    assert dict((B * S).ranges) == {"B": (0, 8), "S": (1, 64)}
    with pytest.raises(TypeError):
        B * 1.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: moec.dim("2"), "'2' is no name for a dim"),
        (lambda: moec.dim("while"), "no name"),
        (lambda: moec.dim(3), "the name of a dim is a text such as 'S', got 3"),
        (lambda: moec.dim("S", min=-1), "dim S: min=-1 is no size; sizes are 0 or more"),
        (lambda: moec.dim("S", max=-3), "dim S: max=-3 is no size"),
        (lambda: moec.dim("S", max=2.5), r"dim S: max=2\.5 is no size"),
        (lambda: moec.dim("S", max=True), "dim S: max=True is no size"),
        (lambda: moec.dim("S", min=None), "dim S: min=None is no size"),
        (lambda: moec.dim("S", min=5, max=4), "no size lies between min=5 and max=4"),
        (lambda: S * moec.dim("S", max=9), "S has two ranges, 1 <= S <= 64 and 0 <= S <= 9"),
    ],
)
def test_dims_that_are_none(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(DimError, match=message):
        make()


@pytest.mark.parametrize(
    ("dynamic", "message"),
    [
        ("S", "dynamic is True, or a mapping"),
        (None, "dynamic is True, or a mapping"),
        ({"y": {1: S}}, "Net has no input 'y'; it has x, mask, flat"),
        ({"masks": {1: S}}, "Net has no input 'masks'; did you mean 'mask'?"),
        ({3: {1: S}}, "Net has no input 3"),
        ({"x": [S]}, r"x needs a mapping of axes to dims, such as \{1: moec.dim\('S'\)\}"),
        ({"x": {-1: S}}, "x: -1 is no axis; axes are counted from the front, from 0"),
        ({"x": {True: S}}, "x: True is no axis"),
        ({"x": {1: "S"}}, "x axis 1: 'S' is no dim"),
        ({"x": {1: -2}}, "x axis 1: -2 is no dim"),
        ({"x": {1: S - 65}}, "x axis 1 is S - 65, which is less than 0 for every 1 <= S <= 64"),
        (
            {"x": {1: S}, "mask": {1: moec.dim("S", max=9)}},
            "mask axis 1: dim S has two ranges, 1 <= S <= 64 and 0 <= S <= 9; make it once",
        ),
    ],
    ids=str,
)
def test_declarations_that_contradict(dynamic: Any, message: str) -> None:
    with pytest.raises(CompileError, match=message):
        moec.compile(Net(), dynamic=dynamic)


def test_a_wrapper_takes_any_input() -> None:
    class Wrapper(nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return args, kwargs

    assert str(declare(Wrapper(), {"ids": {1: S}})) == "ids [_, S, ...], 1 <= S <= 64"


def test_the_width_of_a_block_is_no_free_size() -> None:
    for width in (HIDDEN, moec.dim("H", min=HIDDEN, max=HIDDEN)):
        moec.compile(Loop(), dynamic={"x": {0: B, 1: S, 2: width}})
    message = rf"x axis 2 is declared as H with 0 <= H <= 9, but Loop works for {HIDDEN} there only"
    with pytest.raises(CompileError, match=message):
        moec.compile(Loop(), dynamic={"x": {2: moec.dim("H", max=9)}})


# What it says of regions.


@pytest.mark.parametrize(
    ("dynamic", "ranks", "limits"),
    [
        ({"x": {0: B, 1: S}}, {}, {"B": 8, "S": 64, "T": 512}),
        ({"x": {1: S}}, {}, {"S": 64}),
        ({"x": {0: B}}, {}, {"T": 8}),  # tokens in one axis, if nothing else is known
        ({"x": {0: B}}, {"x": 2}, {"B": 8}),
        ({"x": {0: 1, 1: S}}, {}, {"B": 1, "S": 64, "T": 64}),
        ({"x": {0: B * S}}, {"x": 1}, {"T": 512}),
        ({"x": {0: moec.dim("T")}}, {"x": 1}, {}),
        ({"x": {0: B, 1: S}, "mask": {0: B, 1: 3 * S}}, {}, {"B": 8, "S": 192, "T": 1536}),
        ({"x": {0: B, 1: S}, "mask": {0: B, 1: moec.dim("L")}}, {}, {"B": 8}),
        ({"x": {0: B, 1: S}, "mask": {2: S}}, {}, {"B": 8, "S": 64, "T": 512}),
    ],
    ids=str,
)
def test_limits_of_tokens(dynamic: Any, ranks: dict[str, int], limits: dict[str, int]) -> None:
    assert token_limits(declare(Net(), dynamic), ranks) == limits


def test_regions_are_compiled_for_the_declared_sizes() -> None:
    net = Net()
    compiled = moec.compile(net, dynamic={"x": {0: B, 1: S}})
    for lead in ((2, 7), (1, 1), (0, 3), (8, 32)):
        assert torch.allclose(compiled(tokens(*lead)), net(tokens(*lead)), atol=1e-5)
    assert [high(r) for r in regions(compiled)] == [512, 512]
    assert len(regions(compiled)[0].session.artifacts) == 1
    text = str(moec.explain(compiled))
    assert "declared: x [B, S, ...], 0 <= B <= 8, 1 <= S <= 64" in text
    assert "0 <= T <= 512" in text


def test_a_region_with_more_tokens_than_declared_is_compiled_for_all_sizes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    net = Net()
    compiled = moec.compile(net, dynamic={"x": {0: B, 1: S}})
    with caplog.at_level(logging.INFO, "moec.recompiles"):
        for lead in ((2, 7), (8, 64), (2, 7)):
            assert torch.allclose(compiled(tokens(*lead)), net(tokens(*lead)), atol=1e-5)
    assert "second: T = 1024, more than the 512 of the declared inputs" in caplog.text
    first, second = regions(compiled)
    assert [a.graph.ranges["T"][1] for a in second.artifacts] == [512, 2**31 - 1]
    assert len(first.session.artifacts) == 2


def test_one_declared_axis_of_two_says_nothing_of_all_tokens() -> None:
    compiled = moec.compile(Net(), dynamic={"x": {0: B}})
    compiled(tokens(1, 3))
    assert high(regions(compiled)[0]) == 2**31 - 1
    flat = moec.compile(Loop(), dynamic={"x": {0: moec.dim("T", max=99)}})
    flat(tokens(5))
    assert high(regions(flat)[0]) == 99


def test_a_compiled_graph_serves_what_a_tracer_knows() -> None:
    torch._dynamo.reset()
    net = Net()
    compiled = moec.compile(net, dynamic={"x": {0: B, 1: S}})
    call: Any = torch.compile(compiled, fullgraph=True, dynamic=True, backend="eager")
    for lead in ((2, 7), (3, 5)):
        assert torch.allclose(call(tokens(*lead)), net(tokens(*lead)), atol=1e-5)
    assert [high(r) for r in regions(compiled)] == [512, 2**31 - 1]  # the second has 2*B*S
    with pytest.raises(Exception, match=r"Net: x axis 1 must be 1 <= S <= 64"):
        call(tokens(2, 65))
    fixed: Any = torch.compile(moec.compile(net, dynamic={"x": {0: 2}}), backend="eager")
    fixed(tokens(2, 3))
    with pytest.raises(Exception, match=r"Net: x axis 0 must be 2"):
        fixed(tokens(3, 3))


def test_the_whole_graph_knows_the_sizes_too() -> None:
    torch._dynamo.reset()
    net = Net()
    options = {"model_backend": "eager"}
    compiled = moec.compile(net, dynamic={"x": {0: B, 1: S}}, scope="model", options=options)
    assert torch.allclose(compiled(tokens(2, 7)), net(tokens(2, 7)), atol=1e-5)
    assert [high(r) for r in regions(compiled)] == [512, 2**31 - 1]
    with pytest.raises(CallError, match="Net: x axis 1 has size 65"):
        compiled(tokens(2, 65))


def test_padded_rows_keep_to_the_declared_sizes() -> None:
    assert [Captures((0,), True, most=6).size_for(n) for n in (1, 3, 5, 6)] == [1, 4, 6, 6]
    assert [Captures((0,), True).size_for(n) for n in (5, 512)] == [8, 512]
    assert Captures((0,), False, most=6).size_for(5) == 5


# What is refused when it comes.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": tokens(9, 2)}, "Net: x axis 0 has size 9, but it is declared as B with 0 <= B <= 8"),
        ({"x": tokens(2, 0)}, "x axis 1 has size 0, but it is declared as S with 1 <= S <= 64"),
        ({"x": tokens(2, 65)}, "x axis 1 has size 65, but it is declared as S with 1 <= S <= 64"),
        (
            {"x": tokens(2, 7), "mask": torch.ones(2, 6)},
            "x axis 1 has size 7 and mask axis 1 has size 6, but both are declared as S with",
        ),
        ({"x": [1]}, "x is a list, but its axis 0 is declared as B; give a tensor"),
        ({"x": tokens(2)[0]}, r"x has shape \(8,\), but its axis 1 is declared as S"),
        (
            {"x": tokens(2, 7), "flat": torch.ones(13)},
            r"flat axis 0 has size 13, but it is declared as B\*S = 14 where B = 2, S = 7",
        ),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_sizes_that_are_not_as_declared(arguments: dict[str, Any], message: str) -> None:
    dynamic: Any = {"x": {0: B, 1: S}, "mask": {0: B, 1: S}, "flat": {0: B * S}}
    compiled = moec.compile(Net(), dynamic=dynamic)
    with pytest.raises(CallError, match=message):
        compiled(**arguments)
    in_order = [arguments.get(name) for name in ("x", "mask", "flat")]
    with pytest.raises(CallError, match=message):
        compiled(*in_order)
    assert not regions(compiled)[0].artifacts  # nothing was compiled, nothing launched


def test_a_size_that_follows_from_others() -> None:
    cache = moec.dim("C", max=100)
    dynamic: Any = {"x": {0: 2, 1: S}, "mask": {1: S + cache}}
    compiled = moec.compile(Net(), dynamic=dynamic)
    with pytest.raises(CallError, match=r"mask axis 1 has size 6, .* 7 <= C \+ S <= 107 where"):
        compiled(tokens(2, 7), torch.ones(2, 6))
    with pytest.raises(CallError, match=r"x axis 0 has size 3, but it is declared as 2$"):
        compiled(tokens(3, 7))
    compiled(tokens(2, 7), torch.ones(2, 7))


def test_copies_are_checked_and_pickles_are_the_original() -> None:
    compiled = moec.compile(Net(), dynamic={"x": {1: S}})
    for copied in (copy.deepcopy(compiled), copy.copy(compiled)):
        with pytest.raises(CallError, match="x axis 1 has size 65"):
            copied(tokens(2, 65))
    block = moec.compile(Loop(), dynamic={"x": {1: S}})
    with pytest.raises(CallError, match="Loop: x axis 1 has size 65"):
        copy.deepcopy(block)(tokens(2, 65))
    loaded = pickle.loads(pickle.dumps(compiled))
    assert type(loaded) is Net
    loaded(tokens(2, 65))


def test_a_compiled_block_refuses_what_its_code_is_not_right_for() -> None:
    compiled = moec.compile(Loop())
    many = torch.zeros(1, HIDDEN).expand(2**31, HIDDEN)  # of no memory
    message = r"@Loop: %\w+ has T = 2147483648, but the compiled code is right for 0 <= T <= "
    with pytest.raises(CallError, match=message):
        compiled(many)


def test_experts_whose_arguments_have_other_numbers_of_tokens() -> None:
    torch.manual_seed(0)
    experts = moec.compile(Stacked())
    assert [r.kind for r in regions(experts)] == ["experts"]
    idx, w = torch.zeros(4, 2, dtype=torch.long), torch.ones(4, 2)
    with pytest.raises(CallError, match=r"%x has T = 5, but %idx has T = 4 \(its axis 0\); both"):
        experts(tokens(5), idx, w)


# What surrounds a model.


def test_a_model_without_a_block_is_checked_too_and_compiled_once() -> None:
    with pytest.warns(UserWarning, match="found no MoE block"):
        compiled = moec.compile(nn.Linear(4, 4), dynamic={"input": {0: B}})
    with pytest.raises(CallError, match="Linear: input axis 0 has size 9"):
        compiled(torch.ones(9, 4))
    with pytest.raises(CompileError, match="compiled already"):
        moec.compile(compiled)


@pytest.mark.parametrize("scope", ["region", "model"])
def test_libraries_see_the_inputs_of_the_model(scope: str) -> None:
    net = Net()
    compiled = moec.compile(net, dynamic={"x": {1: S}}, scope=scope)
    assert inspect.signature(compiled.forward) == inspect.signature(net.forward)
    block: Any = moec.compile(Loop(), scope=scope)
    assert list(inspect.signature(block.forward).parameters) == ["x"]


def test_an_exported_program_has_the_declared_sizes() -> None:
    net = Net()
    compiled = moec.compile(net, dynamic={"x": {0: B, 1: S}})
    free = {"x": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}
    program = torch.export.export(compiled, (tokens(2, 7),), dynamic_shapes=free, strict=False)
    assert torch.allclose(program.module()(tokens(3, 9)), net(tokens(3, 9)), atol=1e-5)
    with pytest.raises(Exception, match="size"):
        program.module()(tokens(3, 65))


# Marks of torch.compile.


@pytest.mark.parametrize("mark", [mark_dynamic, mark_unbacked])
def test_marks_neither_specialise_nor_fail(mark: Any) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    block = Loop()
    compiled = moec.compile(block)
    traced: Any = torch.compile(compiled, fullgraph=True, backend="eager")
    for lead in ((2, 7), (3, 5), (1, 2), (4, 1), (1, 1), (0, 3)):
        x = tokens(*lead) if lead[0] else torch.randn(*lead, HIDDEN)
        mark(x, 0)
        mark(x, 1)
        assert torch.allclose(compiled(x), block(x), atol=1e-5)
        if mark is mark_unbacked:
            assert torch.allclose(traced(x), block(x), atol=1e-5)
    assert len(regions(compiled)[0].session.artifacts) == 1
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == (mark is mark_unbacked)


# The command line.


def test_dims_of_the_command_line() -> None:
    words = ["x:0=B[1..8]", "x:1 = S[2..]", "mask:1=S", "flat:0=B*S", "y:0=1"]
    found = {
        name: {axis: repr(d) for axis, d in axes.items()} for name, axes in read_dims(words).items()
    }
    assert found == {
        "x": {0: "<dim B: 1 <= B <= 8>", 1: "<dim S: 2 <= S>"},
        "mask": {1: "<dim S: 0 <= S>"},
        "flat": {0: "<dim B*S: 0 <= B, 0 <= S>"},
        "y": {0: "<dim 1>"},
    }
    dynamic = read_dims(words[:4])
    assert str(declare(Net(), dynamic)).endswith("1 <= B <= 8, 2 <= S")


def invoke(*words: str) -> Any:
    return CliRunner().invoke(app, words)


@pytest.mark.parametrize(
    ("word", "code", "message"),
    [
        ("input_ids:1", 2, "write an input, its axis and a dim"),
        ("input_ids:1=S[1..", 2, "write an input"),
        ("input_ids:-1=S", 2, "write an input"),
        ("input_ids:1=S[5..2]", 2, "no size lies between min=5 and max=2"),
        ("input_ids:1=2*S[1..4]", 2, "is no name; a range belongs to one"),
        ("input_ids:1=__import__('os')", 2, "is not allowed in the dim"),
        ("input_ids:1=1.5", 2, "is not allowed in the dim"),
        ("ids:1=S[1..4]", 1, "has no input 'ids'"),
    ],
)
def test_words_that_are_no_dims(word: str, code: int, message: str) -> None:
    result = invoke("trace", "mixtral", "--dim", word)
    assert result.exit_code == code
    assert message in re.sub(r"[\s│]+", " ", result.output)


def test_an_axis_that_is_declared_twice() -> None:
    result = invoke("explain", "mixtral", "--dim", "x:1=S", "--dim", "x:1=B")
    assert result.exit_code == 2 and "x axis 1 is declared twice" in result.output


def test_declared_dims_are_in_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    FAMILIES["mixtral"]().config.save_pretrained("tiny")
    dims = ("--dim", "input_ids:0=B[1..8]", "--dim", "input_ids:1=S[1..16384]")
    result = invoke("trace", "tiny", *dims, "-o", "a.moe")
    assert result.exit_code == 0, result.output
    text = Path("a.moe").read_text()
    assert "// input_ids [B, S, ...], 1 <= B <= 8, 1 <= S <= 16384\n" in text
    assert parse(text).ranges == {"T": (0, 131072)}
    assert "0 <= T <= 131072" in invoke("explain", "tiny", *dims).output
    planned = invoke("plan", "tiny", *dims, "--fits", "80GiB").output
    assert "T = 65536" in planned and "with up to 131072 tokens" in planned
    alone = invoke("trace", "tiny", "--dim", "input_ids:1=S[1..131072]")
    assert "T of the regions keeps its own range" in alone.output
    for command in ("explain", "plan"):
        assert invoke(command, "a.moe", "--dim", "input_ids:1=S").exit_code == 2
