"""Models and inputs that are not as they should be: the same as eager, or a precise message."""

from __future__ import annotations

import copy
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import moec
from moec.api import regions
from moec.errors import MoecError
from tests.bad_models import EXPERTS, HIDDEN, Block, Expert, Loop, Stacked


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield


def quietly(model: nn.Module) -> nn.Module:
    """The compiled model; what stays as it was may be warned about."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled: nn.Module = moec.compile(model)
        return compiled


def status(compiled: nn.Module) -> list[str]:
    return [region.status for region in regions(compiled)]


def step(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Output and gradients, that of the tokens among them."""
    model.zero_grad(set_to_none=True)
    tokens = x.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = model(tokens)
    if not out.requires_grad:
        return out, {}
    (out * torch.linspace(-1, 1, out.numel()).reshape(out.shape)).sum().backward()
    assert tokens.grad is not None
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return out.detach(), {**found, "tokens": tokens.grad}


def _named(name: str) -> Callable[[str], str]:
    return lambda message: f"{name}: {message}"


def assert_same(model: nn.Module, compiled: nn.Module, x: torch.Tensor | None = None) -> None:
    """Both give the same output and gradients."""
    x = torch.randn(2, 7, HIDDEN) if x is None else x
    expected, wanted = step(model, x)
    actual, got = step(compiled, x)
    torch.testing.assert_close(actual, expected, equal_nan=True)
    if not wanted:
        return  # without tokens the loop of eager adds nothing that has a gradient
    zero = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for name in wanted.keys() | got.keys():
        ours, theirs = got.get(name, zero.get(name)), wanted.get(name, zero.get(name))
        torch.testing.assert_close(ours, theirs, equal_nan=True, msg=_named(name))


# Experts that disagree.


def odd_one(odd: nn.Module, place: int) -> Loop:
    experts: list[nn.Module] = [Expert() for _ in range(EXPERTS)]
    experts[place] = odd
    return Loop(experts)


DISAGREEING: dict[str, Callable[[], nn.Module]] = {
    "activation": lambda: Expert(activation=functional.gelu),
    "width": lambda: Expert(inner=16),
    "bias": lambda: Expert(bias=True),
    "identity": nn.Identity,
    "linear": lambda: nn.Linear(HIDDEN, HIDDEN),
}


@pytest.mark.parametrize("place", [0, 1, EXPERTS - 1])
@pytest.mark.parametrize("kind", DISAGREEING)
def test_one_expert_of_another_kind(kind: str, place: int) -> None:
    model = odd_one(DISAGREEING[kind](), place)
    assert_same(model, quietly(model))


@pytest.mark.parametrize("place", [0, 1, EXPERTS - 1])
def test_one_expert_of_another_dtype(place: int) -> None:
    class Cast(Expert):
        def forward(self, x: torch.Tensor) -> Any:
            return super().forward(x.to(self.up.weight.dtype)).to(x.dtype)

    experts: list[nn.Module] = [Cast() for _ in range(EXPERTS)]
    experts[place].double()
    model = Loop(experts)
    assert_same(model, quietly(model))


def test_one_quantised_expert_is_left_alone() -> None:
    class Int8(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(
                torch.randint(-9, 9, (HIDDEN, HIDDEN), dtype=torch.int8), requires_grad=False
            )

        def forward(self, x: torch.Tensor) -> Any:
            return x @ (self.weight.to(x.dtype) * 0.1)

    model = odd_one(Int8(), 1)
    assert_same(model, quietly(model))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("activation", "activation is gelu, not silu"),
        ("width", r"up.weight is \[16, 8\], not \[12, 8\]"),
        ("bias", "it has up.bias, which the others lack"),
        ("identity", "it is a Identity, not a Expert"),
    ],
)
def test_a_message_names_the_expert_that_differs(kind: str, message: str) -> None:
    model = nn.Sequential(odd_one(DISAGREEING[kind](), 2))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compiled = moec.compile(model)
    if status(compiled) == ["compiled"]:  # experts of several kinds are read in groups
        assert not caught
        x = torch.randn(2, 5, HIDDEN)
        torch.testing.assert_close(compiled(x), model(x))
        return
    assert len(caught) == 1
    expected = rf"0 \(Loop\) stays as it was: experts\.2 differs from experts\.0: {message}; "
    with pytest.raises(MoecError, match=expected):
        moec.compile(model, strict=True)


def test_a_list_of_layers_is_not_taken_for_experts() -> None:
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4), nn.Conv1d(4, 4, 1)])
            self.head = nn.Linear(4, 5)

    with pytest.warns(UserWarning, match="found no MoE block") as caught:
        moec.compile(Layers())
    assert len(caught) == 1


# Experts that share.


def test_two_experts_are_one_module() -> None:
    shared = Expert()
    model = Loop([Expert(), shared, Expert(), shared])
    assert_same(model, quietly(model))


def test_all_experts_are_one_module() -> None:
    model = Loop([Expert()] * EXPERTS)
    assert_same(model, quietly(model))


def test_two_experts_share_one_parameter() -> None:
    experts: list[nn.Module] = [Expert() for _ in range(EXPERTS)]
    experts[3].up.weight = experts[1].up.weight  # type: ignore[union-attr]
    model = Loop(experts)
    assert_same(model, quietly(model))


def test_overlapping_weights_are_read_as_they_are() -> None:
    experts = Stacked()
    numbers = torch.randn(4000) * 0.3
    experts.gate_up.data = numbers.as_strided((EXPERTS, 12, HIDDEN), (5, HIDDEN, 1))
    model = Block(experts)
    assert_same(model, quietly(model))


def test_expanded_weights_get_the_gradient_of_eager() -> None:
    class Expanded(Stacked):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Parameter(torch.randn(1, HIDDEN, 6) * 0.3)
            del self.down

        @property
        def down(self) -> torch.Tensor:  # type: ignore[override]
            return self.one.expand(EXPERTS, -1, -1)

    model = Block(Expanded())
    assert_same(model, quietly(model))


def test_an_expanded_parameter() -> None:
    experts = Stacked()
    experts.down = nn.Parameter((torch.randn(1, HIDDEN, 6) * 0.3).expand(EXPERTS, -1, -1))
    model = Block(experts)
    assert_same(model, quietly(model))


def test_router_and_experts_share_one_parameter() -> None:
    class Tied(Block):
        def forward(self, x: torch.Tensor) -> Any:
            flat = x.reshape(-1, x.shape[-1])
            shared: Any = self.experts
            w, idx = functional.linear(flat, shared.gate_up[:, 0]).softmax(-1).topk(2)
            return self.experts(flat, idx, w).view(x.shape)

    model = Tied()
    assert_same(model, quietly(model))


# Sizes at the edge.


@pytest.mark.parametrize("make", [Loop, Block])
def test_one_expert(make: Any) -> None:
    inner = [Expert()] if make is Loop else Stacked(experts=1)
    model = make(inner, choices=1)
    assert_same(model, quietly(model))


@pytest.mark.parametrize("make", [Loop, Block])
def test_more_choices_than_experts_raises_what_eager_raises(make: Any) -> None:
    model = make(choices=EXPERTS + 1)
    x = torch.randn(2, 3, HIDDEN)
    with pytest.raises(RuntimeError) as expected:
        model(x)
    compiled = quietly(model)
    with warnings.catch_warnings(), pytest.raises(RuntimeError) as actual:
        warnings.simplefilter("ignore")
        compiled(x)
    assert str(actual.value) == str(expected.value)


def test_an_empty_list_of_experts() -> None:
    model = Loop([], choices=1)
    assert_same(model, quietly(model))


@pytest.mark.parametrize("make", [Loop, Block])
@pytest.mark.parametrize("shape", [(0, 3, HIDDEN), (2, 0, HIDDEN), (0, HIDDEN), (1, 1, HIDDEN)])
def test_no_tokens_and_one_token_in_training(make: Any, shape: tuple[int, ...]) -> None:
    model = make()
    assert_same(model, quietly(model), torch.randn(shape))


def test_hidden_size_zero() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns about weights without elements
        model = Block(Stacked(hidden=0))
    x = torch.randn(2, 3, 0)
    assert same_or_both_raise(model, quietly(model), x)


# Inputs.


@pytest.mark.parametrize("make", [Loop, Block])
@pytest.mark.parametrize(
    "x",
    [
        torch.randn(2, 3, 2, HIDDEN),
        torch.randn(HIDDEN),
        torch.randn(2, 3, HIDDEN).transpose(0, 1),
        torch.randn(3, 14, 2 * HIDDEN)[:, ::2, ::2],
    ],
    ids=["rank 4", "rank 1", "transposed", "strided"],
)
def test_inputs_of_other_ranks_and_strides(make: Any, x: torch.Tensor) -> None:
    model = make()
    assert_same(model, quietly(model), x)


@pytest.mark.parametrize("make", [Loop, Block])
@pytest.mark.parametrize(
    "x",
    [
        torch.randn(2, 3, HIDDEN, dtype=torch.complex64),
        torch.ones(2, 3, HIDDEN, dtype=torch.int64),
        torch.ones(2, 3, HIDDEN, dtype=torch.bool),
        torch.randn(2, 3, HIDDEN + 1),
        torch.randn(2, 3, HIDDEN).to_sparse(),
        torch.randn(2, 3, 0),
    ],
    ids=["complex", "integers", "booleans", "width", "sparse", "no width"],
)
def test_inputs_that_eager_refuses_are_refused(make: Any, x: torch.Tensor) -> None:
    model = make()
    with pytest.raises((RuntimeError, NotImplementedError, TypeError)):
        model(x)
    compiled = quietly(model)
    with warnings.catch_warnings(), pytest.raises((RuntimeError, TypeError, MoecError)):
        warnings.simplefilter("ignore")
        compiled(x)
    good = torch.randn(2, 3, HIDDEN)
    torch.testing.assert_close(compiled(good), model(good))


@pytest.mark.parametrize("make", [Loop, Block])
def test_a_nested_tensor_gives_what_eager_gives(make: Any) -> None:
    model = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = torch.nested.nested_tensor([torch.randn(2, HIDDEN), torch.randn(3, HIDDEN)])
        assert same_or_both_raise(model, quietly(model), x)


def same_or_both_raise(model: nn.Module, compiled: nn.Module, x: torch.Tensor) -> bool:
    try:
        expected = model(x)
    except Exception:
        with pytest.raises(Exception):  # noqa: B017
            compiled(x)
        return True
    return torch.equal(compiled(x), expected)


@pytest.mark.parametrize("make", [Loop, Block])
def test_a_subclass_of_tensor_runs(make: Any) -> None:
    class Marked(torch.Tensor):
        pass

    model = make()
    x = torch.randn(2, 3, HIDDEN)
    marked = x.as_subclass(Marked)
    compiled = quietly(model)
    torch.testing.assert_close(
        compiled(marked).as_subclass(torch.Tensor), model(marked).as_subclass(torch.Tensor)
    )
    assert type(compiled(marked)) is type(model(marked))


@pytest.mark.parametrize("make", [Loop, Block])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_no_numbers(make: Any, bad: float) -> None:
    model = make()
    x = torch.randn(2, 5, HIDDEN)
    x[0, 1, 3] = bad
    x[1, 4] = bad
    compiled = quietly(model)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), equal_nan=True)


@pytest.mark.parametrize("index", [-1, EXPERTS, EXPERTS + 3])
def test_indices_out_of_range_do_what_eager_does(index: int) -> None:
    experts = Stacked()
    compiled: Any = quietly(Block(experts)).experts
    x, w = torch.randn(5, HIDDEN), torch.rand(5, 2)
    idx = torch.tensor([[0, 1], [2, index], [3, 0], [index, index], [1, 2]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(compiled(x, idx, w), experts(x, idx, w))


# Autograd.


@pytest.mark.parametrize("make", [Loop, Block])
def test_double_backward_is_right_or_refused(make: Any) -> None:
    model = make()
    compiled = quietly(model)
    x = torch.randn(1, 5, HIDDEN)

    def second(net: nn.Module) -> torch.Tensor:
        tokens = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(net(tokens).square().sum(), tokens, create_graph=True)
        (found,) = torch.autograd.grad(first.square().sum(), tokens)
        return found

    expected = second(model)
    try:
        actual = second(compiled)
    except (RuntimeError, MoecError) as error:
        assert "has no second derivative" in str(error)
        return
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("make", [Loop, Block])
def test_backward_twice(make: Any) -> None:
    model = make()
    compiled = quietly(model)
    x = torch.randn(1, 5, HIDDEN)

    def twice(net: nn.Module) -> list[torch.Tensor]:
        net.zero_grad(set_to_none=True)
        loss = net(x).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
        return [p.grad.clone() for p in net.parameters() if p.grad is not None]

    for ours, theirs in zip(twice(compiled), twice(model), strict=True):
        torch.testing.assert_close(ours, theirs)
    loss = compiled(x).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


# Devices.


@pytest.mark.parametrize("make", [Loop, Block])
def test_a_model_on_meta_is_captured_when_it_has_weights(make: Any) -> None:
    source = make()
    with torch.device("meta"):
        model = make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled = moec.compile(model)
    assert "on the meta device" in regions(compiled)[0].reason
    compiled.to_empty(device="cpu")
    compiled.load_state_dict(source.state_dict())
    assert_same(source, compiled)
    assert status(compiled) == ["compiled"]


def test_assigned_weights_after_meta() -> None:
    source = Block()
    with torch.device("meta"):
        model = Block()
    compiled = quietly(model)
    compiled.load_state_dict(source.state_dict(), assign=True)
    assert_same(source, compiled)


@pytest.mark.parametrize("make", [Loop, Block])
def test_a_block_split_across_devices_is_reported(make: Any) -> None:
    model = nn.Sequential(make())
    model[0].experts.to("meta")
    compiled = quietly(model)
    assert status(compiled) != ["compiled"]
    assert all(w in regions(compiled)[0].reason for w in ("cpu", "meta", "experts"))
    with pytest.raises(MoecError, match=r"0 .*experts.*meta"):
        moec.compile(model, strict=True)


@pytest.mark.parametrize("make", [Loop, Block])
def test_weights_that_accelerate_keeps_elsewhere(make: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = nn.Sequential(make(), make())
    x = torch.randn(2, 3, HIDDEN)
    expected = model(x)
    offloaded = accelerate.cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    compiled = quietly(offloaded)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(compiled(x), expected)
        torch.testing.assert_close(compiled(x[:, :1]), expected[:, :1])


# Calls of several kinds.


def test_a_model_without_experts_is_returned_with_one_warning() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with pytest.warns(UserWarning, match="found no MoE block") as caught:
        compiled = moec.compile(model)
    assert len(caught) == 1
    assert [type(m) for m in compiled.modules()] == [type(m) for m in model.modules()]
    with pytest.raises(MoecError, match="found no MoE block"):
        moec.compile(model, strict=True)


@pytest.mark.parametrize("make", [Loop, Block])
def test_threads_that_race_for_the_first_call(make: Any) -> None:
    model = make()
    compiled = quietly(model)
    inputs = [torch.randn(1, n + 1, HIDDEN) for n in range(8)]
    expected = [model(x).detach() for x in inputs]
    found: list[Any] = [None] * len(inputs)
    start = threading.Barrier(len(inputs))

    def call(place: int) -> None:
        start.wait()
        try:
            out = compiled(inputs[place])
            out.sum().backward()
            found[place] = out.detach()
        except Exception as error:
            found[place] = error

    threads = [threading.Thread(target=call, args=(n,)) for n in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert len(regions(compiled)[0].session.artifacts) == 1


def test_a_capture_does_not_disturb_calls_of_other_threads() -> None:
    # Of a loop: torch.export, which reads the other blocks, traces calls of every thread.
    model = Loop()
    compiled = quietly(model)
    deep = torch.randn(1, 5, HIDDEN)
    flat = deep[0]
    expected, wrong, done = model(deep), [], threading.Event()

    def call_again_and_again() -> None:
        while not done.is_set():
            if not torch.allclose(compiled(deep), expected, atol=1e-5):
                wrong.append(1)

    threads = [threading.Thread(target=call_again_and_again) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        torch.testing.assert_close(compiled(flat), expected[0])  # another rank: captured anew
        (compiled(flat).sum() + compiled(deep).sum()).backward()
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not wrong


@pytest.mark.parametrize("make", [Loop, Block])
def test_a_process_that_forks_after_compilation(make: Any) -> None:
    model = make()
    compiled = quietly(model)
    x = torch.randn(1, 5, HIDDEN)
    with torch.no_grad():
        compiled(x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # newer Pythons warn about threads at every fork
            child = os.fork()
        if child == 0:
            same = torch.allclose(compiled(x[:, :3]), model(x[:, :3]), atol=1e-5)
            os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_model_on_two_devices_by_accelerate(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = nn.Sequential(Block(), Loop())
    x = torch.randn(2, 3, HIDDEN)
    expected = model(x)
    parted = copy.deepcopy(model)
    accelerate.disk_offload(parted[1], str(tmp_path), execution_device=torch.device("cpu"))
    compiled = quietly(parted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(compiled(x), expected)
    assert status(compiled) == ["compiled", "left as it was"]


def test_indices_that_eager_refuses_are_refused() -> None:
    class Strict(Stacked):
        def forward(self, x: torch.Tensor, idx: torch.Tensor, w: torch.Tensor) -> Any:
            mask = functional.one_hot(idx, EXPERTS + 1).permute(2, 1, 0)
            out = torch.zeros_like(x)
            for number in mask[:EXPERTS].sum((-1, -2)).nonzero():
                place, token = torch.where(mask[number[0]])
                gate, up = functional.linear(x[token], self.gate_up[number[0]]).chunk(2, -1)
                rows = functional.linear(functional.silu(gate) * up, self.down[number[0]])
                out.index_add_(0, token, rows * w[token, place, None])
            return out

    experts = Strict()
    compiled: Any = quietly(Block(experts)).experts
    x, w = torch.randn(2, HIDDEN), torch.rand(2, 2)
    torch.testing.assert_close(
        compiled(x, torch.tensor([[0, EXPERTS], [1, 2]]), w),
        experts(x, torch.tensor([[0, EXPERTS], [1, 2]]), w),
    )
    for index in (-1, EXPERTS + 1):
        with pytest.raises(RuntimeError):
            experts(x, torch.tensor([[0, index], [1, 2]]), w)
        with pytest.raises(RuntimeError):
            compiled(x, torch.tensor([[0, index], [1, 2]]), w)


@pytest.mark.parametrize("make", [Loop, Block])
def test_a_model_is_compiled_twice_from_the_original(make: Any) -> None:
    model = make()
    first, second = quietly(model), quietly(model)
    assert_same(model, first)
    assert_same(model, second)
