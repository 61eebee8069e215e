"""The public calls: what they refuse and how, what they tell, what they leave on disk."""

from __future__ import annotations

import importlib.util
import re
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import moec
from moec.api import OPTIONS, advice, regions
from moec.errors import CallError, CompileError, MoecError, PassError
from moec.ir.parser import parse
from tests.models import build, relative_error, tokens

HIDDEN = 8


class Block(nn.Module):
    """A small block with a loop."""

    def __init__(self, number: int = 0) -> None:
        super().__init__()
        self.number = number  # as models number their layers
        self.router = nn.Linear(HIDDEN, 4)
        self.experts = nn.ModuleList([nn.Linear(HIDDEN, HIDDEN) for _ in range(4)])

    def forward(self, x: torch.Tensor) -> Any:
        flat = x.reshape(-1, HIDDEN)
        weights, chosen = self.router(flat).softmax(-1).topk(2)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, place = torch.where(chosen == number)
            out.index_add_(0, token, expert(flat[token]) * weights[token, place, None])
        return out.view(x.shape)


class Odd(Block):
    """One that cannot be captured."""

    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x) * (2 if x.sum() > 0 else 1)


class Net(nn.Module):
    """Blocks one after the other."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks)

    def forward(self, x: torch.Tensor) -> Any:
        for layer in self.layers:
            x = x + layer(x)
        return x


# What is refused.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": "tpu"}, r"unknown target 'tpu'; targets: triton, aten"),
        ({"scope": "module"}, r"unknown scope 'module'.*'region'"),
        ({"dynamic": False}, r"dynamic=False.*leave dynamic=True"),
        ({"memory_budget": "plenty"}, r"memory_budget.*is no size"),
        ({"options": {"speed": 11}}, r"unknown option 'speed'\. Options are .*dump: folder"),
        ({"options": ["dump"]}, r"options is a mapping"),
        ({"options": {"dump": 3}}, r"option 'dump' is a folder's path, got 3"),
        ({"options": {"cache": b"x"}}, r"option 'cache' is a folder's path"),
        ({"options": {"passes": 3}}, r"option 'passes' is a pipeline's text, got 3"),
    ],
    ids=str,
)
def test_arguments_that_cannot_be_taken(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(CompileError, match=message):
        moec.compile(Block(), **arguments)


def test_unknown_pass_is_named() -> None:
    with pytest.raises(PassError, match="unknown pass 'no-such-pass'; passes: "):
        moec.compile(Block(), options={"passes": "cse, no-such-pass"})


def test_a_file_in_the_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for option in ("dump", "cache"):
        with pytest.raises(CompileError, match=f"option '{option}': cannot make the folder"):
            moec.compile(Block(), options={option: tmp_path / "file" / "below"})


@pytest.mark.parametrize("model", [None, "model", len, Block, {"model": 1}], ids=str)
def test_only_modules_are_compiled(model: Any) -> None:
    with pytest.raises(CompileError, match=r"moec\.compile takes an nn\.Module, got \w+"):
        moec.compile(model)


def test_compiling_twice_is_refused() -> None:
    compiled = moec.compile(Net(Block()))
    with pytest.raises(CompileError, match="compiled already; compile the original again"):
        moec.compile(compiled)
    assert regions(moec.compile(Net(Block())))


def test_a_model_that_cannot_be_copied() -> None:
    class Stubborn(Block):
        def __deepcopy__(self, memo: Any) -> Any:
            raise RuntimeError("I hold a socket")

    with pytest.raises(CompileError, match=r"Stubborn holds something.*I hold a socket"):
        moec.compile(Stubborn())


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.randn(2, 3, HIDDEN, dtype=torch.float64), r"layers\.0: the tokens .* are float64"),
        (torch.randn(2, 3, HIDDEN, dtype=torch.float16), r"layers\.0: the tokens .* are float16"),
        (torch.ones(2, 3, HIDDEN, dtype=torch.long), r"layers\.0: the tokens .* are int64"),
        (torch.randn(2, 3, HIDDEN + 1), r"layers\.0: %\w+ must be f32\[T, 8\], got shape \(6, 9\)"),
        (torch.randn(2, 3, HIDDEN, device="meta"), r"layers\.0: %\w+ is on cpu, the tokens are on"),
    ],
    ids=["float64", "float16", "int64", "width", "device"],
)
def test_wrong_tokens_are_refused_by_name(x: torch.Tensor, message: str) -> None:
    compiled = moec.compile(Net(Block()))
    for _ in range(2):  # and again at the next call
        with pytest.raises(CallError, match=message):
            compiled(x)
    good = torch.randn(2, 3, HIDDEN)
    assert compiled(good).shape == good.shape


def test_tokens_of_another_rank_run_as_they_did() -> None:
    net = Net(Block())
    compiled = moec.compile(net)
    x = torch.randn(2, 3, 5, HIDDEN)
    with pytest.warns(UserWarning, match=r"layers\.0 \(Block\) stays as it was.*rank 4"):
        actual = compiled(x)
    torch.testing.assert_close(actual, net(x))
    flat = torch.randn(7, HIDDEN)
    torch.testing.assert_close(compiled(flat), net(flat))
    assert regions(compiled)[0].status == "compiled"


class Scaled(Block):
    """Takes more than tokens."""

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> Any:
        return super().forward(x) * scale


def test_calls_with_more_than_tokens_run_as_they_did() -> None:
    block = Scaled()
    compiled = moec.compile(block)
    assert regions(compiled)[0].status == "compiled"
    x = torch.randn(1, 3, HIDDEN)
    with pytest.warns(UserWarning, match=r"stays as it was: .* called with more than tokens"):
        torch.testing.assert_close(compiled(x, 0.5), block(x, 0.5))
    torch.testing.assert_close(compiled(x, scale=2.0), block(x, scale=2.0))
    assert regions(compiled)[0].status == "left as it was"
    assert "called with more than tokens" in str(moec.explain(compiled))
    torch.testing.assert_close(compiled(x), block(x))
    assert regions(compiled)[0].status == "compiled"


# Strictness.


def test_strict_mode_raises_what_would_be_warned_about() -> None:
    with pytest.warns(UserWarning) as caught:
        moec.compile(Net(Odd()))
    assert len(caught) == 1
    with pytest.raises(MoecError) as raised:
        moec.compile(Net(Odd()), strict=True)
    assert str(raised.value) == str(caught[0].message)


def test_strict_mode_takes_what_compiles() -> None:
    x = torch.randn(1, 3, HIDDEN)
    net = Net(Block(), Block())
    torch.testing.assert_close(moec.compile(net, strict=True)(x), net(x))


def test_a_model_without_experts_is_returned_unchanged() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.warns(UserWarning, match="found no MoE block in Sequential") as caught:
        compiled = moec.compile(model)
    assert len(caught) == 1
    assert [type(m) for m in compiled.modules()] == [type(m) for m in model.modules()]
    assert compiled[0].weight is model[0].weight
    with pytest.raises(MoecError, match="found no MoE block"):
        moec.compile(model, strict=True)


def test_equal_problems_are_warned_about_once() -> None:
    with pytest.warns(UserWarning) as caught:
        moec.compile(Net(*(Odd() for _ in range(5))))
    assert len(caught) == 1


# What explain says.


def test_explain_a_compiled_model() -> None:
    compiled = moec.compile(Net(Block(), Block()))
    compiled(torch.randn(1, 3, HIDDEN)).sum().backward()
    text = str(moec.explain(compiled))
    assert text.splitlines()[0] == "Net: 2 MoE regions: 2 compiled"
    for name in ("layers.0", "layers.1"):
        assert f"  {name}  Block: compiled, target aten" in text
    assert re.search(r"structure [0-9a-f]{16}, \d+ ops", text)
    assert re.search(r"training artifact: .*\.py", text)


def test_explain_a_partly_compiled_model() -> None:
    with pytest.warns(UserWarning):
        compiled = moec.compile(Net(Block(), Odd()))
    text = str(moec.explain(compiled))
    assert text.splitlines()[0] == "Net: 2 MoE regions: 1 compiled, 1 left as it was"
    assert re.search(r"layers\.1  Odd: left as it was.*\n.*why not the whole block: .*Odd", text)
    assert f"what to do: {advice(regions(compiled)[1])}" in text


def test_explain_a_model_that_is_not_compiled() -> None:
    net = Net(Block(), Odd())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        explanation = moec.explain(net)
    assert [r.status for r in explanation.regions] == ["compiled", "left as it was"]
    assert [type(m) for m in net.layers] == [Block, Odd]
    plain = moec.explain(nn.Linear(3, 3))
    assert "no MoE block found" in str(plain)
    assert not plain.regions


def test_explain_experts_only() -> None:
    compiled = moec.compile(build("mixtral", router_jitter_noise=0.1).train())
    text = str(moec.explain(compiled))
    assert "2 MoE regions: 2 experts only" in text
    assert "nothing is needed: the experts are compiled" in text


# What stays on disk and in memory.


def test_cache_folder_and_artifacts(tmp_path: Path) -> None:
    compiled = moec.compile(Net(Block()), options={"cache": tmp_path})
    x = torch.randn(2, 3, HIDDEN)
    compiled(x).sum().backward()
    with torch.no_grad():
        compiled(x)
    (region,) = regions(compiled)
    assert [a.mode for a in region.artifacts] == ["training", "inference"]
    for artifact in region.artifacts:
        assert artifact.path.parent == tmp_path
        assert artifact.path.read_text().startswith('"""')
        spec = importlib.util.spec_from_file_location("emitted_by_test", artifact.path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert callable(module.forward)
        assert hasattr(module, "backward") == (artifact.mode == "training")


def test_a_second_run_uses_the_same_files(tmp_path: Path) -> None:
    x = torch.randn(2, 3, HIDDEN)
    for _ in range(2):
        moec.compile(Net(Block()), options={"cache": tmp_path})(x)
    assert len(list(tmp_path.glob("*.py"))) == 2  # one of them for few tokens


def test_history_holds_the_graphs_after_each_pass() -> None:
    compiled = moec.compile(Net(Block()))
    (region,) = regions(compiled)
    assert [name for name, _ in region.history] == ["capture"]
    compiled(torch.randn(2, 3, HIDDEN))
    names = [name for name, _ in region.history]
    assert names[0] == "capture"
    assert any(name.startswith("grad") for name in names)
    graphs = [graph for _, graph in region.history]
    assert all(a is not b for a, b in pairwise(graphs))


def test_dump_writes_a_folder_for_each_region_and_mode(tmp_path: Path) -> None:
    x = torch.randn(2, 30, HIDDEN)
    compiled = moec.compile(Net(Block(), Other()), options={"dump": tmp_path})
    compiled(x.clone().requires_grad_()).sum().backward()
    with torch.no_grad():
        compiled(x)
    for region in ("layers.0", "layers.1"):
        folders = sorted(p.name for p in (tmp_path / region).iterdir())
        assert folders == ["inference", "training", "training-few"]
        for mode in folders:
            files = sorted(p.name for p in (tmp_path / region / mode).iterdir())
            assert files[0] == "00-input.moe"
            assert len(files) > 2
            for file in files:
                parse((tmp_path / region / mode / file).read_text())


class Other(Block):
    """Another function."""

    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x) * 0.5


def test_dump_keeps_a_second_form_of_a_mode_apart(tmp_path: Path) -> None:
    compiled = moec.compile(Net(Block()), options={"dump": tmp_path})
    x = torch.randn(2, 3, HIDDEN)
    compiled(x).sum().backward()
    compiled(x.clone().requires_grad_()).sum().backward()  # another gradient is wanted
    folders = sorted(p.name for p in (tmp_path / "layers.0").iterdir())
    assert len(folders) == 4  # two forms, each with one for few tokens
    assert sum(name.startswith("training-few") for name in folders) == 2


def test_other_passes_than_the_usual_ones() -> None:
    net = Net(Block())
    compiled = moec.compile(net, options={"passes": "grad, dce"})
    x = torch.randn(2, 3, HIDDEN)
    with torch.no_grad():
        with_other = moec.compile(net, options={"passes": "cse, dce"})(x)
    torch.testing.assert_close(with_other, net(x))
    compiled(x).sum().backward()
    assert [name.split("{")[0] for name, _ in regions(compiled)[0].history][1:] == [
        "grad",
        "dce",
    ]


def test_every_option_is_described() -> None:
    assert all(OPTIONS.values())


def test_many_equal_layers_cost_one() -> None:
    compiled = moec.compile(Net(*(Block(n) for n in range(48))))
    compiled(torch.randn(1, 3, HIDDEN)).sum().backward()
    found = regions(compiled)
    assert len(found) == 48
    session = found[0].session
    assert len(session.captures) == 1
    # The first layer's input is data, that of the others needs a gradient.
    assert len(session.artifacts) == 2
    assert len({a.path for r in found for a in r.artifacts}) == 2


def test_large_language_model_layers_cost_one() -> None:
    model = build("olmoe", num_hidden_layers=8)
    compiled = moec.compile(model)
    actual = compiled(**tokens(1, 5)).logits
    assert relative_error(actual, model(**tokens(1, 5)).logits) <= 1e-5
    session = regions(compiled)[0].session
    assert (len(session.captures), len(session.artifacts)) == (1, 1)


# Hooks and arguments by name.


def test_hooks_that_were_there_before() -> None:
    class Listener:
        def __init__(self) -> None:
            self.heard = 0

        def hook(self, *_: Any) -> None:
            self.heard += 1

    listener, net = Listener(), Net(Block(), Block())
    for layer in net.layers:
        layer.register_forward_hook(listener.hook)
    compiled = moec.compile(net)
    compiled(torch.randn(1, 3, HIDDEN))
    assert listener.heard == 2, "a hook's owner must not be copied"


def test_arguments_by_name() -> None:
    model = build("olmoe")
    compiled = moec.compile(model)
    x = torch.randn(5, 32)
    idx, w = torch.rand(5, 8).topk(2).indices, torch.rand(5, 2)
    expected = model.model.layers[0].mlp.experts(x, idx, w)
    experts = compiled.model.layers[0].mlp.experts
    torch.testing.assert_close(experts(x, top_k_weights=w, top_k_index=idx), expected)
    torch.testing.assert_close(experts(top_k_index=idx, hidden_states=x, top_k_weights=w), expected)
    whole = compiled.model.layers[0].mlp
    hidden = torch.randn(1, 5, 32)
    torch.testing.assert_close(whole(hidden_states=hidden), model.model.layers[0].mlp(hidden))
