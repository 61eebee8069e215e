"""Weights that change, move, are replaced or computed after compilation: noticed, never stale."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.ao import quantization
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.utils import parametrize

import moec
from moec.errors import CallError, MoecError
from tests.models import assert_equal_gradients, build, gradients, relative_error, tokens

FAMILIES = ["olmoe", "deepseek_v3", "gpt_oss"]
every_family = pytest.mark.parametrize("family", FAMILIES)


def assert_equal_steps(compiled: Any, model: Any) -> None:
    """Logits and gradients of one step."""
    found, ours = gradients(compiled, tokens(2, 7))
    wanted, theirs = gradients(model, tokens(2, 7))
    assert relative_error(found.logits, wanted.logits) <= 1e-5
    assert_equal_gradients(ours, theirs)


def fresh(
    family: str, change: Callable[[Any], None] = lambda _: None, strict: bool = True
) -> tuple[Any, Any]:
    """A compiled model that ran a step before a change, and an uncompiled one after the same."""
    model, compiled = build(family), moec.compile(build(family), strict=strict)
    assert_equal_steps(compiled, model)
    for each in (model, compiled):
        change(each)
    return model, compiled


def router(model: Any) -> nn.Module:
    """The router of the last block."""
    block = model.model.layers[-1].mlp
    found: nn.Module = block.gate if hasattr(block, "gate") else block.router
    return found


def statuses(compiled: nn.Module) -> set[str]:
    """What became of the regions."""
    return {region.status for region in moec.regions(compiled)}


# Replacing and changing.


def scale_data(model: nn.Module) -> None:
    """Other memory behind the same parameters."""
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.2


def scale_in_place(model: nn.Module) -> None:
    """The same memory with other values."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.2)


def replace(model: nn.Module) -> None:
    """Other parameters."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.detach() * 1.2))


def assign(model: nn.Module) -> None:
    """Other parameters, from a state dict."""
    model.load_state_dict({k: v * 1.2 for k, v in model.state_dict().items()}, assign=True)


def freeze_some(model: Any) -> None:
    """Fewer gradients."""
    router(model).requires_grad_(False)
    model.model.layers[1].mlp.experts.down_proj.requires_grad_(False)


def through_meta(model: nn.Module) -> None:
    """Away and back."""
    tensors = {k: v.clone() for k, v in (*model.named_parameters(), *model.named_buffers())}
    model.to("meta")
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            tensor.copy_(tensors[name])


@every_family
@pytest.mark.parametrize(
    "change", [scale_data, scale_in_place, replace, assign, freeze_some, through_meta]
)
def test_changes_are_seen(family: str, change: Callable[[Any], None]) -> None:
    model, compiled = fresh(family, change)
    assert_equal_steps(compiled, model)
    assert statuses(compiled) == {"compiled"}


def test_gradients_may_be_switched_on_again() -> None:
    model, compiled = fresh("olmoe", freeze_some)
    for each in (model, compiled):
        each.requires_grad_(True)
    assert_equal_steps(compiled, model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_another_dtype(dtype: torch.dtype) -> None:
    model, compiled = fresh("olmoe", lambda each: each.to(dtype))
    found, expected = compiled(**tokens(2, 7)).logits, model(**tokens(2, 7)).logits
    assert found.dtype == expected.dtype == dtype
    assert relative_error(found, expected) <= {8: 1e-12, 2: 2e-2}[dtype.itemsize]
    for each in (model, compiled):
        each.float()
    found, expected = compiled(**tokens(2, 7)).logits, model(**tokens(2, 7)).logits
    assert relative_error(found, expected) <= (1e-5 if dtype == torch.float64 else 2e-2)


class Mixed(nn.Module):
    """A router that computes in the dtype of its weight, whatever that is."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8))
        self.experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, 8)
        logits = nn.functional.linear(flat.to(self.weight.dtype), self.weight)
        weights, chosen = logits.softmax(-1).topk(2)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, place = torch.where(chosen == number)
            rows = expert(flat[token]) * weights[token, place, None].to(flat.dtype)
            out.index_add_(0, token, rows)
        return out.view(x.shape)


def test_the_dtype_of_one_weight_may_change_alone() -> None:
    block = Mixed()
    compiled = moec.compile(block, strict=True)
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(compiled(x), block(x))
    block.weight.data = block.weight.data.double()
    torch.testing.assert_close(compiled(x), block(x))
    assert statuses(compiled) == {"compiled"}


@every_family
def test_compiled_on_meta_then_given_memory(family: str) -> None:
    reference = build(family)
    with torch.device("meta"):
        model = type(reference)(reference.config).eval()
    compiled = moec.compile(model)
    assert "on the meta device" in str(moec.explain(compiled))
    compiled.to_empty(device="cpu")
    tensors = {**dict(reference.named_parameters()), **dict(reference.named_buffers())}
    with torch.no_grad():
        for name, tensor in (*compiled.named_parameters(), *compiled.named_buffers()):
            tensor.copy_(tensors[name])
    assert_equal_steps(compiled, reference)
    assert statuses(compiled) == {"compiled"}


@every_family
def test_changes_between_forward_and_backward_are_noticed_as_eager_notices_them(
    family: str,
) -> None:
    for each in fresh(family):
        loss = each(**tokens(2, 7)).loss
        with torch.no_grad():
            for parameter in each.model.layers[1].mlp.parameters():
                parameter.add_(0.1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


# Copies and files.


@every_family
def test_a_deep_copy_has_weights_of_its_own(family: str) -> None:
    model, compiled = fresh(family)
    twin, expected = copy.deepcopy(compiled), copy.deepcopy(model)
    scale_in_place(twin)
    scale_in_place(expected)
    assert_equal_steps(twin, expected)
    assert_equal_steps(compiled, model)


def test_pickles_hold_the_original_classes() -> None:
    model, compiled = fresh("olmoe")
    buffer = io.BytesIO()
    torch.save(compiled, buffer)
    buffer.seek(0)
    loaded = [pickle.loads(pickle.dumps(compiled)), torch.load(buffer, weights_only=False)]
    for twin in loaded:
        assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
        assert_equal_steps(twin, model)


def test_saved_files_are_the_same_bytes(tmp_path: Path) -> None:
    model, compiled = fresh("olmoe")
    files = []
    for name, each in (("before", model), ("after", compiled)):
        each.save_pretrained(tmp_path / name)
        files.append((tmp_path / name / "model.safetensors").read_bytes())
    assert files[0] == files[1]
    loaded = type(model).from_pretrained(tmp_path / "after", experts_implementation="eager")
    assert_equal_steps(moec.compile(loaded.eval(), strict=True), model)
    ours, theirs = compiled.state_dict(), model.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_tied_weights_stay_tied() -> None:
    model = build("olmoe", tie_word_embeddings=True)
    compiled = moec.compile(model, strict=True)
    assert compiled.lm_head.weight is compiled.model.embed_tokens.weight
    assert compiled.lm_head.weight is model.lm_head.weight
    assert_equal_steps(compiled, build("olmoe", tie_word_embeddings=True))


def test_experts_of_two_layers_may_share_their_weights() -> None:
    def tie(model: Any) -> None:
        first, second = (layer.mlp.experts for layer in model.model.layers)
        second.down_proj = first.down_proj

    model, compiled = fresh("olmoe", tie)
    assert_equal_steps(compiled, model)


# Computed weights.


class Scaled(nn.Module):
    """A parametrization."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * 1.5


def parametrized(model: Any) -> None:
    """A router and experts whose weights are computed."""
    parametrize.register_parametrization(router(model), "weight", Scaled())
    experts = model.model.layers[1].mlp.experts
    parametrize.register_parametrization(experts, "down_proj", Scaled())


@pytest.mark.filterwarnings("ignore:moec. model.layers.1.mlp.*its own code runs")
@every_family
def test_parametrizations_put_on_after_compilation(family: str) -> None:
    model, compiled = fresh(family, parametrized, strict=False)
    assert_equal_steps(compiled, model)


def test_parametrizations_that_were_there_before() -> None:
    family = "olmoe"
    model = build(family)
    parametrize.register_parametrization(router(model), "weight", Scaled())
    assert_equal_steps(moec.compile(model, strict=True), model)
    parametrized_experts = build(family)
    experts = parametrized_experts.model.layers[1].mlp.experts
    parametrize.register_parametrization(experts, "down_proj", Scaled())
    compiled = moec.compile(parametrized_experts, strict=True)
    assert_equal_steps(compiled, parametrized_experts)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_weight_norm_as_a_hook() -> None:
    def norm(model: Any) -> None:
        torch.nn.utils.weight_norm(router(model), "weight")

    model, compiled = fresh("olmoe", norm)
    assert_equal_steps(compiled, model)


# Transforms.


@every_family
def test_functional_call_and_grad(family: str) -> None:
    model, compiled = fresh(family)
    weights = {k: v.detach() * 1.1 for k, v in model.named_parameters()}
    arguments = tokens(2, 7)

    def loss(each: Any) -> Callable[..., Any]:
        return lambda w: functional_call(each, w, (), arguments).loss

    torch.testing.assert_close(loss(compiled)(weights), loss(model)(weights))
    found, expected = (torch.func.grad(loss(each))(weights) for each in (compiled, model))
    assert_equal_gradients(found, expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_forward_mode_derivatives() -> None:
    x, t = torch.randn(2, 4, 32), torch.randn(2, 4, 32)
    model, compiled = fresh("olmoe")
    blocks = [each.model.layers[1].mlp for each in (compiled, model)]
    ours, theirs = (torch.func.jvp(block, (x,), (t,)) for block in blocks)
    torch.testing.assert_close(ours, theirs)
    with forward_ad.dual_level():
        dual: Any = forward_ad.make_dual(x, t)  # type: ignore[no-untyped-call]
        tangents = [forward_ad.unpack_dual(b(dual))[1] for b in blocks]  # type: ignore[no-untyped-call]
    torch.testing.assert_close(tangents[0], tangents[1])


def test_vmap_is_refused_as_eager_refuses_it() -> None:
    for each in fresh("olmoe"):
        with pytest.raises(RuntimeError, match=r"vmap: .*dynamic shape"):
            torch.vmap(each.model.layers[1].mlp, randomness="same")(torch.randn(3, 2, 4, 32))


def test_a_second_derivative_is_refused() -> None:
    _, compiled = fresh("olmoe")
    x = torch.randn(2, 4, 32, requires_grad=True)
    y = compiled.model.layers[1].mlp(x)
    with pytest.raises(CallError, match="no second derivative"):
        torch.autograd.grad(y.square().sum(), x, create_graph=True)


# Quantised layers.


quantising = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore:.*quantize_per_tensor"
)


def quantized(*arguments: Any) -> Any:
    """A copy with dynamically quantised layers."""
    return quantization.quantize_dynamic(*arguments)  # type: ignore[no-untyped-call]


def attention_only(model: nn.Module) -> dict[str, Any]:
    """Dynamic quantisation of the attention's linear layers."""
    linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "attn" in n}
    return {name: quantization.default_dynamic_qconfig for name in linear}


@quantising
def test_quantised_attention_before_and_after() -> None:
    model = build("olmoe")
    expected = quantized(model, attention_only(model))
    before = moec.compile(expected, strict=True)
    after = quantized(moec.compile(model, strict=True), attention_only(model))
    for found in (before, after):
        with torch.no_grad():
            ours, theirs = found(**tokens(2, 7)).logits, expected(**tokens(2, 7)).logits
        assert relative_error(ours, theirs) <= 1e-5
        assert statuses(found) == {"compiled"}


class Listed(nn.Module):
    """Experts that are plain layers."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 4)
        self.experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token, place = torch.where(chosen == number)
            out.index_add_(0, token, expert(x[token]) * weights[token, place, None])
        return out


@quantising
def test_quantised_experts_are_left_alone_with_a_message() -> None:
    block = quantized(Listed().eval(), {nn.Linear})
    with pytest.warns(UserWarning, match="quantised"):
        compiled = moec.compile(block)
    x = torch.randn(5, 8)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), block(x))
    with pytest.raises(MoecError, match="quantised"):
        moec.compile(block, strict=True)


@quantising
def test_experts_quantised_after_compilation_are_noticed() -> None:
    compiled = moec.compile(Listed().eval())
    x = torch.randn(5, 8)
    with torch.no_grad():
        compiled(x)
        expected = quantized(compiled, {nn.Linear})
        with pytest.warns(UserWarning, match="replaced after compilation|quantised"):
            found = expected(x)
        plain = pickle.loads(pickle.dumps(compiled))
        wanted = quantized(plain, {nn.Linear})(x)
    torch.testing.assert_close(found, wanted)
