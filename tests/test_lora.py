"""Models with PEFT's low-rank adapters: compiled before and after, and what they keep in memory."""

from __future__ import annotations

import contextlib
import copy
import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrize

import moec
from examples.lora_experts import Largest, main
from moec.cost import saved_values
from tests.lora import ALPHA, EXPERTS, RANK, adapted, merged_delta, randomize_adapters, settings
from tests.models import assert_equal_gradients, build, gradients, relative_error, tokens

FAMILIES = ("olmoe", "mixtral", "gpt_oss", "qwen3_moe")
ORDERS = ("adapters, then compile", "compile, then adapters")


def both(family: str, order: str, config: LoraConfig | None = None) -> tuple[Any, Any]:
    """A model with adapters as PEFT runs it, and a compiled one with equal weights."""
    config = config or settings()
    plain = get_peft_model(build(family), copy.deepcopy(config))
    randomize_adapters(plain)
    if order == ORDERS[0]:
        return plain.eval(), moec.compile(plain)
    compiled = get_peft_model(moec.compile(build(family)), copy.deepcopy(config))
    compiled.load_state_dict(plain.state_dict())
    return plain.eval(), compiled.eval()


def assert_same(plain: Any, compiled: Any, what: str = "") -> None:
    """Equal logits, and every block served by compiled code."""
    with torch.no_grad():
        expected, actual = plain(**tokens(2, 7)).logits, compiled(**tokens(2, 7)).logits
    assert relative_error(actual, expected) <= 1e-5, what
    assert {region.status for region in moec.regions(compiled)} == {"compiled"}, what


def block_of(model: Any, layer: int = 0) -> Any:
    """The MoE block of a layer."""
    return model.get_base_model().model.layers[layer].mlp


def adapters_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """All tensors of adapters by name."""
    return {n: p for n, p in module.named_parameters() if "lora_" in n}


def merged_reference(
    family: str, block: nn.Module, x: torch.Tensor, cotangent: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The block's result and the adapters' gradients, by weights that are merged first."""
    factors = {n: p.detach().clone().requires_grad_() for n, p in adapters_of(block).items()}
    original: Any = build(family).model.layers[0].mlp.to(x.dtype)
    # the wrapper of what is named last is the outer one
    outer, inner = ("experts.", "experts.base_layer.")
    weights = {}
    for prefix, name in ((outer, "down_proj"), (inner, "gate_up_proj")):
        base = getattr(original.experts, name).detach()
        a, b = (factors[f"{prefix}lora_{f}.default.weight"] for f in "AB")
        delta = merged_delta(a, b, base.shape, ALPHA / RANK)
        weights[f"experts.{name}"] = base + delta
    out = functional_call(original, weights, (x,))
    out = out[0] if isinstance(out, tuple) else out
    found = torch.autograd.grad(out, list(factors.values()), cotangent)
    return out, dict(zip(factors, found, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("order", ORDERS)
def test_float64_equals_merged_weights(family: str, order: str) -> None:
    _, model = both(family, order)
    block = block_of(model.double())
    for sizes in ((2, 9), (1, 1), (1, 33)):
        x, cotangent = torch.randn(2, *sizes, 32, dtype=torch.float64).unbind()
        out = block(x)
        out = out[0] if isinstance(out, tuple) else out
        tensors = adapters_of(block)
        found = torch.autograd.grad(out, list(tensors.values()), cotangent)
        expected, wanted = merged_reference(family, block, x, cotangent)
        assert relative_error(out, expected) <= 1e-12
        assert_equal_gradients(dict(zip(tensors, found, strict=True)), wanted, 1e-12)
        if sizes == (2, 9):
            assert all(gradient.any() for gradient in found)
    assert {region.status for region in moec.regions(model)} == {"compiled"}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("order", ORDERS)
def test_float32_equals_peft_and_every_adapter_gets_a_gradient(family: str, order: str) -> None:
    plain, compiled = both(family, order)
    for arguments in (tokens(2, 7), tokens(2, 33, padded=True), tokens(1, 1)):
        expected, wanted = gradients(plain, arguments)
        actual, found = gradients(compiled, arguments)
        assert relative_error(actual.logits, expected.logits) <= 1e-5
        assert_equal_gradients(found, wanted)
        assert found.keys() == adapters_of(compiled).keys()
        assert all(gradient.any() for gradient in found.values())
    assert_same(plain, compiled)
    ids = tokens(2, 5, labels=False)
    generated = [m.generate(**ids, max_new_tokens=4, do_sample=False) for m in (plain, compiled)]
    assert torch.equal(*generated)


@pytest.mark.parametrize("family", ("olmoe", "mixtral"))
def test_training_steps_equal_those_of_peft(family: str) -> None:
    torch.manual_seed(0)
    plain = get_peft_model(build(family), settings())  # with PEFT's own start, zeros in B
    compiled = get_peft_model(moec.compile(build(family)), settings())
    compiled.load_state_dict(plain.state_dict())
    losses = []
    for model in (plain, compiled):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for length in (9, 17, 5, 33):
            optimizer.zero_grad()
            loss = model(**tokens(2, length)).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[4:] == pytest.approx(losses[:4], rel=1e-5)
    wanted = adapters_of(plain)
    for name, tensor in adapters_of(compiled).items():
        assert relative_error(tensor, wanted[name]) <= 1e-4, name


def largest_tensor(block: nn.Module, x: torch.Tensor) -> int:
    """The bytes of the largest tensor that one training step of a block creates."""
    out = block(x)  # what is compiled at the first call is no part of it
    with Largest() as largest:
        out = block(x)
        out = out[0] if isinstance(out, tuple) else out
        out.sum().backward()
    return int(largest.bytes)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("adapters", [1, 2])
def test_no_tensor_is_as_large_as_a_weight(family: str, order: str, adapters: int) -> None:
    plain, compiled = both(family, order)
    for model in (plain, compiled):
        for number in range(1, adapters):
            model.add_adapter(f"more{number}", settings(3))
            model.base_model.set_adapter(["default", f"more{number}"])
    core = block_of(plain).experts.base_layer.base_layer
    weight = min(getattr(core, name).nbytes for name in ("gate_up_proj", "down_proj"))
    x = torch.randn(1, 3, 32, requires_grad=True)
    assert largest_tensor(block_of(plain), x) >= weight
    assert largest_tensor(block_of(compiled), x) < weight / 2


def training_graph(model: Any) -> Any:
    """The graph of the first block's training artifact, after one step."""
    gradients(model, tokens(2, 7))
    artifacts = moec.regions(model)[0].artifacts
    return next(a for a in artifacts if a.mode == "training").graph


def test_nothing_is_computed_or_kept_for_frozen_weights() -> None:
    plain = adapted("olmoe")
    frozen = training_graph(moec.compile(plain))
    given = dict(zip(frozen.inputs, frozen.gradients, strict=True))
    assert {v.hint for v, g in given.items() if g is not None} == {
        v.hint for v in frozen.inputs if v.hint.startswith("lora")
    } | ({"hidden_states"} if frozen.gradients[0] is not None else set())
    for parameter in plain.parameters():
        parameter.requires_grad_(True)
    trained = training_graph(moec.compile(plain))
    assert all(g is not None for g in trained.gradients)
    assert len(saved_values(frozen)) < len(saved_values(trained))


def test_a_frozen_block_before_an_adapter_keeps_no_activation() -> None:
    only = settings(target_modules=["lm_head"], target_parameters=None)
    plain = get_peft_model(build("olmoe"), only)
    compiled = moec.compile(plain)
    gradients(compiled, tokens(2, 7))
    assert {a.mode for r in moec.regions(compiled) for a in r.artifacts} == {"inference"}


@pytest.mark.parametrize("order", ORDERS)
def test_adapters_are_switched_scaled_and_deleted(order: str) -> None:
    plain, compiled = both("olmoe", order)
    pair = (plain, compiled)
    for model in pair:
        model.add_adapter("two", settings(3, use_rslora=True))
        randomize_adapters(model)
    assert_same(*pair, "default")
    changes: dict[str, Any] = {
        "two": lambda m: m.set_adapter("two"),
        "both": lambda m: m.base_model.set_adapter(["default", "two"]),
        "one again": lambda m: m.set_adapter("default"),
        "scaled": scale_adapters,
        "deleted": lambda m: (m.set_adapter("two"), m.delete_adapter("default")),
    }
    logits = [plain(**tokens(2, 7)).logits]
    for name, change in changes.items():
        for model in pair:
            change(model)
        assert_same(*pair, name)
        logits.append(plain(**tokens(2, 7)).logits)
        with contextlib.ExitStack() as stack:
            for model in pair:
                stack.enter_context(model.disable_adapter())
            assert_same(*pair, f"{name}, disabled")
        assert_same(*pair, f"{name}, enabled")
    differ = [not torch.allclose(a, b) for a, b in itertools.pairwise(logits)]
    assert all(differ)


def scale_adapters(model: nn.Module) -> None:
    """Change a number that the adapters' code reads, in place."""
    for module in model.modules():
        scaling = getattr(module, "scaling", None)
        if isinstance(scaling, dict) and "default" in scaling:
            scaling["default"] *= 3.0


@pytest.mark.parametrize("order", ORDERS)
def test_merging_and_unloading(order: str) -> None:
    plain, compiled = both("mixtral", order)
    compiled(**tokens(2, 7))
    merged = copy.deepcopy(compiled)
    merged.merge_adapter()
    assert_same(plain, merged, "merged")
    merged.unmerge_adapter()
    assert_same(plain, merged, "unmerged")
    unloaded = merged.merge_and_unload()
    assert type(unloaded.model.layers[0].mlp.experts).__name__ == "MixtralExperts"
    assert_same(plain, unloaded, "merged for good")
    assert not any("lora" in name for name, _ in unloaded.named_parameters())
    assert_same(plain, compiled, "the model that was copied")


def test_saved_adapters_are_those_of_peft(tmp_path: Path) -> None:
    plain, compiled = both("olmoe", ORDERS[1])
    compiled.save_pretrained(tmp_path)
    assert_same(plain, moec.compile(PeftModel.from_pretrained(build("olmoe"), tmp_path).eval()))
    assert_same(plain, PeftModel.from_pretrained(moec.compile(build("olmoe")), tmp_path).eval())
    loaded = PeftModel.from_pretrained(build("olmoe"), tmp_path)
    assert relative_error(loaded(**tokens(2, 7)).logits, plain(**tokens(2, 7)).logits) == 0


CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "attention": ("olmoe", {"target_modules": ["q_proj", "v_proj"], "target_parameters": None}),
    "router": ("olmoe", {"target_parameters": ["mlp.gate.weight", *EXPERTS]}),
    "router with a bias": ("gpt_oss", {"target_parameters": ["mlp.router.weight"]}),
    "shared": ("deepseek_v3", {"target_modules": ["gate_proj", "up_proj", "down_proj"]}),
    "one of two": ("qwen3_moe", {"target_parameters": [EXPERTS[1]]}),
    "ranks": (
        "qwen3_moe",
        {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"gate_up_proj": 5}},
    ),
    "rslora": ("mixtral", {"use_rslora": True}),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_other_targets(name: str, order: str) -> None:
    family, changes = CONFIGURATIONS[name]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*keys did not match")
        plain, compiled = both(family, order, settings(**changes))
    expected, wanted = gradients(plain, tokens(2, 7))
    actual, found = gradients(compiled, tokens(2, 7))
    assert relative_error(actual.logits, expected.logits) <= 1e-5
    assert_equal_gradients(found, wanted)
    assert found.keys() == adapters_of(compiled).keys()
    assert_same(plain, compiled)


class Expert(nn.Module):
    """A small network of linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 24), nn.Linear(24, 32)

    def forward(self, x: torch.Tensor) -> Any:
        return self.down(torch.nn.functional.silu(self.up(x)))


class Listed(nn.Module):
    """A block with a list of experts and a loop over it."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(32, 4, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(4))
        self.shared = Expert()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        w, idx = self.router(flat).softmax(-1).topk(2, -1)
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            token, place = torch.where(idx == e)
            if token.numel():
                out.index_add_(0, token, expert(flat[token]) * w[token, place, None])
        result: torch.Tensor = (out + self.shared(flat)).reshape(x.shape)
        return result


def listed() -> nn.Module:
    """A model of two such blocks."""
    torch.manual_seed(0)
    return nn.Sequential(Listed(), Listed(), nn.Linear(32, 5))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("targets", [["up", "down", "router"], r".*experts\.\d+\.down"])
def test_lists_of_experts_with_adapters(order: str, targets: Any) -> None:
    config = LoraConfig(r=4, target_modules=targets)
    plain = get_peft_model(listed(), copy.deepcopy(config))
    randomize_adapters(plain)
    compiled = moec.compile(plain)
    if order == ORDERS[1]:
        compiled = get_peft_model(moec.compile(listed()), copy.deepcopy(config))
        compiled.load_state_dict(plain.state_dict())
    x = torch.randn(3, 5, 32)
    results = []
    for model in (plain, compiled):
        out = model(x)
        out.square().mean().backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append((out, dict(found)))
        model.zero_grad(set_to_none=True)
    (expected, wanted), (actual, gotten) = results
    assert relative_error(actual, expected) <= 1e-5
    assert gotten.keys() == adapters_of(compiled).keys()
    # eager has no gradient for an expert without tokens, compiled code has zeros
    idle = {n: torch.zeros_like(g) for n, g in gotten.items() if n not in wanted}
    assert_equal_gradients(gotten, {**idle, **wanted})
    assert len(idle) < len(wanted)
    assert {region.status for region in moec.regions(compiled)} == {"compiled"}


def test_dropout_in_training_mode_leaves_a_block_as_it_was() -> None:
    plain = get_peft_model(listed(), LoraConfig(r=4, target_modules=["up"], lora_dropout=0.5))
    randomize_adapters(plain)
    compiled = moec.compile(plain.eval())
    x = torch.randn(3, 5, 32)
    assert relative_error(compiled(x), plain(x)) <= 1e-5
    assert {region.status for region in moec.regions(compiled)} == {"compiled"}
    results = []
    with pytest.warns(UserWarning, match=r"lora_dropout.* draws other numbers at each call"):
        for model in (plain.train(), compiled.train()):
            torch.manual_seed(1)
            results.append(model(x))
    assert relative_error(*results) <= 1e-5


class LowRank(nn.Module):
    """A parametrization that somebody wrote: a weight and a batched product."""

    def __init__(self, experts: int, rows: int, columns: int) -> None:
        super().__init__()
        self.left = nn.Parameter(0.2 * torch.randn(experts, rows, 3))
        self.right = nn.Parameter(0.2 * torch.randn(experts, 3, columns))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight - 0.5 * torch.bmm(self.left, self.right)


def test_a_parametrization_of_the_same_form_gains_too() -> None:
    model = build("olmoe").requires_grad_(False)
    for layer in model.model.layers:
        experts = layer.mlp.experts
        for name in ("gate_up_proj", "down_proj"):
            shape = getattr(experts, name).shape
            parametrize.register_parametrization(experts, name, LowRank(*shape))
            experts.parametrizations[name].original.requires_grad_(False)
    compiled = moec.compile(model)
    expected, wanted = gradients(model, tokens(2, 7))
    actual, found = gradients(compiled, tokens(2, 7))
    assert relative_error(actual.logits, expected.logits) <= 1e-5
    assert_equal_gradients(found, wanted)
    x = torch.randn(1, 3, 32, requires_grad=True)
    largest = largest_tensor(compiled.model.layers[0].mlp, x)
    assert largest < model.model.layers[0].mlp.experts.down_proj.nbytes / 2


def test_a_parametrization_after_compilation_runs_as_it_is() -> None:
    model = build("olmoe")
    compiled = moec.compile(model)
    experts = compiled.model.layers[0].mlp.experts
    lowered = LowRank(*experts.down_proj.shape)
    reference = build("olmoe")
    for owner in (reference, compiled):
        parametrize.register_parametrization(
            owner.model.layers[0].mlp.experts, "down_proj", lowered
        )
    with pytest.warns(UserWarning, match="got a parametrization after compilation"):
        actual = compiled(**tokens(2, 7)).logits
    assert relative_error(actual, reference(**tokens(2, 7)).logits) <= 1e-5


def test_the_example_succeeds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main() == 0
    assert "largest tensor of a step, moec" in capsys.readouterr().out


class Passing(nn.Module):
    """A wrapper without weights: it may do anything, such as synchronise."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.inner(*args, **kwargs)


def test_a_wrapper_without_weights_is_run() -> None:
    model = build("olmoe")
    for layer in model.model.layers:
        layer.mlp.experts = Passing(layer.mlp.experts)
    expected = model(**tokens(2, 7)).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = moec.compile(model)
    wrapper = compiled.model.layers[0].mlp.experts
    before = wrapper.calls
    assert relative_error(compiled(**tokens(2, 7)).logits, expected) <= 1e-5
    assert wrapper.calls == before + 1


@pytest.fixture(autouse=True)
def _few_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*use_cache=True.*")
        yield
