"""Five unmodified Hugging Face families, compiled and eager: the same numbers, the same habits."""

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
from transformers import AutoModelForCausalLM

import moec
from moec.api import regions
from moec.compiled import region_of
from tests.models import (
    FAMILIES,
    artifacts,
    assert_equal_gradients,
    blocks,
    build,
    gradients,
    pair,
    relative_error,
    tokens,
)

LENGTHS = (1, 2, 7, 33, 257)
every_family = pytest.mark.parametrize("family", FAMILIES)


@every_family
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_logits_loss_and_gradients_equal_eager(family: str, training: bool, padded: bool) -> None:
    model, compiled = pair(family)
    model.train(training)
    compiled.train(training)
    for length in LENGTHS:
        for batch in (1, 2):
            arguments = tokens(batch, length, padded=padded and length > 1)
            expected, expected_gradients = gradients(model, arguments)
            actual, actual_gradients = gradients(compiled, arguments)
            assert relative_error(actual.logits, expected.logits) <= 1e-5
            if length > 1:
                assert relative_error(actual.loss, expected.loss) <= 1e-5
            assert_equal_gradients(actual_gradients, expected_gradients)


@every_family
def test_one_compilation_serves_all_lengths(family: str) -> None:
    model = build(family)
    compiled = moec.compile(model)
    found = regions(compiled)
    assert [r.status for r in found] == ["compiled", "compiled"]
    session = found[0].session
    for training in (False, True):
        compiled.train(training)
        gradients(compiled, tokens(2, LENGTHS[0]))
        compiled_so_far = len(session.captures), len(session.artifacts)
        for length in LENGTHS[1:]:
            gradients(compiled, tokens(1, length))
        assert (len(session.captures), len(session.artifacts)) == compiled_so_far
    assert len(session.captures) == 2  # one a mode for both layers
    assert len(artifacts(compiled)) == 1  # both modes compute the same
    assert all(r.artifacts == found[0].artifacts for r in found)


@every_family
def test_generate_gives_the_same_tokens(family: str) -> None:
    model, compiled = pair(family)
    arguments = tokens(2, 6, padded=True, labels=False)
    options = {"max_new_tokens": 8, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    expected = model.generate(**arguments, **options)
    actual = compiled.generate(**arguments, **options)
    assert actual.shape == (2, 14)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe"])
def test_router_losses_see_the_routers(family: str) -> None:
    model = build(family, output_router_logits=True, router_aux_loss_coef=0.5)
    compiled = moec.compile(model)
    arguments = tokens(2, 17, padded=True)
    for with_router in (True, False, True):  # hooks come and go
        model.config.output_router_logits = with_router
        expected, expected_gradients = gradients(model, arguments)
        actual, actual_gradients = gradients(compiled, arguments)
        assert_equal_gradients(actual_gradients, expected_gradients)
        assert relative_error(actual.loss, expected.loss) <= 1e-5
        if with_router:
            assert relative_error(actual.aux_loss, expected.aux_loss) <= 1e-5
            for ours, theirs in zip(actual.router_logits, expected.router_logits, strict=True):
                assert relative_error(ours, theirs) <= 1e-5


@every_family
def test_double_precision(family: str) -> None:
    model = build(family).double()
    compiled = moec.compile(model)
    expected, expected_gradients = gradients(model, tokens(2, 17))
    actual, actual_gradients = gradients(compiled, tokens(2, 17))
    assert relative_error(actual.logits, expected.logits) <= 1e-12
    # These families take router scores in float32: there both round alike.
    assert_equal_gradients(actual_gradients, expected_gradients, tolerance=1e-12)


def _errors(
    reference: tuple[Any, dict[str, torch.Tensor]], other: tuple[Any, dict[str, torch.Tensor]]
) -> tuple[float, float]:
    """Relative errors of the logits and of all gradients together, in the Euclidean norm."""
    logits = _norm_error([other[0].logits], [reference[0].logits])
    names = sorted(reference[1])
    return logits, _norm_error([other[1][n] for n in names], [reference[1][n] for n in names])


def _norm_error(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    one = torch.cat([t.detach().double().flatten() for t in actual])
    two = torch.cat([t.detach().double().flatten() for t in expected])
    return float((one - two).norm() / two.norm())


@every_family
def test_bfloat16_is_as_close_to_the_truth_as_eager(family: str) -> None:
    model = build(family).bfloat16()
    compiled = moec.compile(model)
    arguments = tokens(2, 33)
    truth = gradients(copy.deepcopy(model).double(), arguments)
    eager = _errors(truth, gradients(model, arguments))
    ours = _errors(truth, gradients(compiled, arguments))
    # One token that takes another expert in one of the two is luck, not a fault.
    assert ours[0] <= 1.5 * eager[0] + 1e-3
    assert ours[1] <= 1.5 * eager[1] + 1e-2


@every_family
def test_autocast_is_as_close_to_the_truth_as_eager(family: str) -> None:
    model, compiled = pair(family)
    arguments = tokens(2, 33)
    truth = gradients(model, arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        eager = _errors(truth, gradients(model, arguments))
        ours = _errors(truth, gradients(compiled, arguments))
    assert eager[0] > 1e-4, "autocast did nothing"
    assert ours[0] <= 1.5 * eager[0] + 1e-3
    assert ours[1] <= 1.5 * eager[1] + 1e-2


@every_family
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(family: str, context: Callable[[], Any]) -> None:
    model, compiled = pair(family)
    model.eval()
    compiled.eval()
    for length in (1, 9):
        with context():
            expected = model(**tokens(2, length, labels=False)).logits
            actual = compiled(**tokens(2, length, labels=False)).logits
        assert not actual.requires_grad
        assert relative_error(actual, expected) <= 1e-5


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model = build("olmoe")
    arguments = tokens(2, 17)
    expected = gradients(model.train(), arguments)[1]
    compiled = moec.compile(model)
    name = "activation_checkpointing_enable"  # its name in newer versions of transformers
    enable = getattr(compiled, name, None) or compiled.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    assert_equal_gradients(gradients(compiled.train(), arguments)[1], expected)


def _saved_bytes(model: nn.Module, arguments: dict[str, torch.Tensor]) -> int:
    """Bytes of all tensors that autograd keeps for the backward pass, weights aside."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**arguments)
    return sum(kept.values())


@every_family
def test_frozen_experts_get_no_gradient_and_save_less(family: str) -> None:
    model = build(family)
    compiled = moec.compile(model)
    arguments = tokens(2, 33)
    saved = [_saved_bytes(compiled, arguments)]
    for frozen in (".mlp.experts.", ".mlp."):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and frozen not in name)
        expected, actual = gradients(model, arguments)[1], gradients(compiled, arguments)[1]
        assert not any(frozen in name for name in actual)
        assert_equal_gradients(actual, expected)
        saved.append(_saved_bytes(compiled, arguments))
    # A router that learns needs the tokens all the same; without it they are not saved either.
    assert saved[0] >= saved[1] > saved[2]


def test_frozen_model_with_gradient_of_the_input() -> None:
    model = build("qwen3_moe").requires_grad_(False)
    compiled = moec.compile(model)
    found = []
    for each in (model, compiled):
        embedded = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
        embedded.requires_grad_()
        each(inputs_embeds=embedded).logits.square().mean().backward()
        found.append(embedded.grad)
    assert found[0] is not None and found[1] is not None
    assert relative_error(found[1], found[0]) <= 1e-5


@every_family
def test_weights_are_the_original_ones(family: str) -> None:
    model = build(family)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    compiled = moec.compile(model)
    compiled(**tokens(1, 3))
    assert list(compiled.state_dict()) == list(before)
    for name, tensor in compiled.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])
    names = [n for n, _ in model.named_parameters()]
    assert [n for n, _ in compiled.named_parameters()] == names
    assert all(compiled.get_parameter(n) is model.get_parameter(n) for n in names)
    assert type(compiled) is type(model)
    assert compiled is not model


def test_optimizer_step_through_the_compiled_model() -> None:
    model, twin = build("olmoe"), build("olmoe")
    compiled = moec.compile(model)
    for each, trained in ((model, compiled), (twin, twin)):
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
        for step in range(3):
            optimizer.zero_grad()
            trained(**tokens(2, 9 + step)).loss.backward()
            optimizer.step()
        assert each.lm_head.weight.grad is not None
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert relative_error(ours, theirs) <= 1e-4, name
    assert relative_error(model.model.norm.weight, build("olmoe").model.norm.weight) > 1e-4


def test_deepcopy_has_weights_of_its_own() -> None:
    compiled = moec.compile(build("deepseek_v3"))
    arguments = tokens(1, 5)
    compiled(**arguments)
    second = copy.deepcopy(compiled)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.mul_(1.1)
    plain = copy.deepcopy(second)
    plain.load_state_dict(second.state_dict())
    assert [r.status for r in regions(second)] == ["compiled", "compiled"]
    expected = build("deepseek_v3")
    expected.load_state_dict(second.state_dict())
    assert relative_error(second(**arguments).logits, expected(**arguments).logits) <= 1e-5
    assert relative_error(plain(**arguments).logits, expected(**arguments).logits) <= 1e-5
    original = build("deepseek_v3")
    assert relative_error(compiled(**arguments).logits, original(**arguments).logits) <= 1e-5


@pytest.mark.parametrize("which", ["original", "compiled"])
def test_pickles_as_the_plain_model(which: str) -> None:
    model = build("qwen3_moe")
    compiled = moec.compile(model)
    expected = compiled(**tokens(1, 5)).logits
    restored = pickle.loads(pickle.dumps(model if which == "original" else compiled))
    assert not any(region_of(m) for m in restored.modules())
    assert [type(m) for m in restored.modules()] == [type(m) for m in model.modules()]
    assert relative_error(restored(**tokens(1, 5)).logits, expected) <= 1e-5
    assert regions(compiled), "pickling must not undo the compilation"


def test_torch_save_and_load() -> None:
    compiled = moec.compile(build("gpt_oss"))
    buffer = io.BytesIO()
    torch.save(compiled, buffer)
    buffer.seek(0)
    restored = torch.load(buffer, weights_only=False)
    again = moec.compile(restored)
    arguments = tokens(1, 5)
    assert relative_error(again(**arguments).logits, compiled(**arguments).logits) <= 1e-5


def test_save_pretrained_round_trip(tmp_path: Path) -> None:
    model = build("mixtral")
    compiled = moec.compile(model)
    compiled.save_pretrained(tmp_path)
    assert list(tmp_path.glob("*.safetensors"))
    restored = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
    assert type(restored) is type(model)
    for name, tensor in restored.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])


def test_other_dtype_after_compilation() -> None:
    model = build("qwen3_moe")
    compiled = moec.compile(model)
    arguments = tokens(1, 7)
    compiled(**arguments)
    compiled.double()
    assert next(model.parameters()).dtype == torch.float64
    assert relative_error(compiled(**arguments).logits, model(**arguments).logits) <= 1e-12
    compiled.float()
    assert relative_error(compiled(**arguments).logits, model(**arguments).logits) <= 1e-5


@pytest.mark.filterwarnings("ignore:moec")  # which says that the experts cannot be read so
def test_one_part_in_another_dtype_after_compilation() -> None:
    model = build("olmoe")
    compiled = moec.compile(model)
    compiled(**tokens(1, 7))
    for each in (model, compiled):
        each.model.layers[0].mlp.experts.double()
        with pytest.raises((RuntimeError, moec.MoecError)):
            each(**tokens(1, 7))


def test_train_and_eval_are_the_twins_own() -> None:
    model = build("mixtral", router_jitter_noise=0.2)
    compiled = moec.compile(model)
    compiled.train()
    assert not model.training
    arguments = tokens(1, 9)
    model.train()
    torch.manual_seed(3)
    expected = model(**arguments).logits
    torch.manual_seed(3)
    actual = compiled(**arguments).logits
    assert relative_error(actual, expected) <= 1e-5
    quiet = compiled.eval()(**arguments).logits
    assert relative_error(actual, quiet) > 1e-3
    assert relative_error(quiet, model.eval()(**arguments).logits) <= 1e-5


def test_replaced_parameter_is_used() -> None:
    model = build("olmoe")
    compiled = moec.compile(model)
    compiled(**tokens(1, 5))
    experts = compiled.model.layers[1].mlp.experts
    experts.down_proj = nn.Parameter(torch.randn_like(experts.down_proj))
    assert model.model.layers[1].mlp.experts.down_proj is experts.down_proj
    expected, expected_gradients = gradients(model, tokens(1, 5))
    actual, actual_gradients = gradients(compiled, tokens(1, 5))
    assert relative_error(actual.logits, expected.logits) <= 1e-5
    assert_equal_gradients(actual_gradients, expected_gradients)


class Adapter(nn.Module):
    """What a low-rank adapter puts around a module."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.down = nn.Parameter(torch.randn(2, 32))

    def forward(self, hidden: torch.Tensor) -> Any:
        logits, *rest = self.inner(hidden + hidden @ self.down.T @ self.down)
        return (logits, *rest)


def test_replaced_submodule_is_read() -> None:
    model = build("olmoe")
    compiled = moec.compile(model)
    compiled(**tokens(1, 5))
    adapter = Adapter(model.model.layers[0].mlp.gate)
    model.model.layers[0].mlp.gate = adapter
    compiled.model.layers[0].mlp.gate = adapter
    actual, actual_gradients = gradients(compiled, tokens(1, 5))
    expected, expected_gradients = gradients(model, tokens(1, 5))
    assert relative_error(actual.logits, expected.logits) <= 1e-5
    assert_equal_gradients(actual_gradients, expected_gradients)
    assert {region.status for region in moec.regions(compiled)} == {"compiled"}


def test_replaced_submodule_of_the_same_class_is_used() -> None:
    model, other = build("olmoe"), build("olmoe")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.2)
    compiled = moec.compile(model)
    compiled(**tokens(1, 5))
    for each in (model, compiled):
        each.model.layers[0].mlp.gate = other.model.layers[0].mlp.gate
        each.model.layers[1].mlp.experts = other.model.layers[1].mlp.experts
    actual = compiled(**tokens(1, 5)).logits
    assert relative_error(actual, model(**tokens(1, 5)).logits) <= 1e-5


def test_changed_setting_is_used() -> None:
    model = build("qwen3_moe")
    compiled = moec.compile(model)
    compiled(**tokens(1, 5))
    for each in (model, compiled):
        each.model.layers[0].mlp.gate.top_k = 1
    actual = compiled(**tokens(1, 5)).logits
    assert relative_error(actual, model(**tokens(1, 5)).logits) <= 1e-5


def test_hooks_inside_a_block_see_their_module() -> None:
    model = build("olmoe")
    compiled = moec.compile(model)
    seen: list[torch.Size] = []
    for _, block in blocks(compiled):
        block.gate.register_forward_hook(lambda m, i, output: seen.append(output[0].shape))
    expected = model(**tokens(2, 5)).logits
    assert relative_error(compiled(**tokens(2, 5)).logits, expected) <= 1e-5
    assert seen == [torch.Size([10, 8])] * 2


def test_the_original_stays_eager() -> None:
    model = build("mixtral")
    types = [type(m) for m in model.modules()]
    moec.compile(model)(**tokens(1, 4))
    assert [type(m) for m in model.modules()] == types
    assert not any(region_of(m) for m in model.modules())
