"""Groups of light operations as one compiled function each, in steps under a memory budget."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import fx, nn

import moec
from moec.budget import fused as fused_module
from moec.budget.capture import captured_step
from moec.budget.fused import compiled
from moec.budget.groups import Group, groups_of
from moec.budget.sizes import planned_sizes
from moec.budget.steps import read_joint
from moec.budget.views import drop_idle_views
from moec.compiled import model_scope_of
from moec.errors import CompileError
from moec.memory.tracked import track

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor compiles with g++ on a CPU"),
    pytest.mark.filterwarnings("ignore:moec. found no MoE block"),
    # Inductor's own imports
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is:DeprecationWarning"),
]
SLACK = 1024


class _Norm(nn.Module):
    """Root mean squares in float32, as models have them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * y.to(x.dtype)


class _Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up = _Norm(width), nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.silu(self.up(self.norm(x))) * 1.5
        z: torch.Tensor = x + self.down(y)
        return z


class _Model(nn.Module):
    """Equal layers and a loss."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[_Layer(32) for _ in range(count)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layers(x)
        return y.float().square().mean()


def layers(count: int, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Such a model, always the same."""
    torch.manual_seed(0)
    return _Model(count).to(dtype)


def planned(model: nn.Module, budget: int | str, fuse: bool = True) -> Any:
    """A model with a budget, planned in little time."""
    options = {"plan_seconds": 2, "fuse_groups": fuse}
    return moec.compile(model, memory_budget=budget, options=options)


def step_of(model: nn.Module) -> Any:
    """The one step that was planned."""
    scope: Any = model_scope_of(model)
    (found,) = scope.steps.values()
    return found.step


def trained(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The gradients of one step."""
    model.zero_grad()
    model(x).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was compiled since the test began."""
    keys: list[str] = []

    def noted(group: Group) -> Callable[..., torch.Tensor]:
        keys.append(group.key())
        return compiled(group)

    monkeypatch.setattr(fused_module, "compiled", noted)
    return keys


def test_gradients_have_the_same_bits_under_any_budget_and_the_peak_is_as_planned(
    compilations: list[str],
) -> None:
    model, x = layers(4, torch.float32), torch.randn(12, 20, 32)
    free = planned(model, "1TiB")
    grads = trained(free, x)
    for grad, reference in zip(grads, trained(model, x), strict=True):
        torch.testing.assert_close(grad, reference)
    step = step_of(free)
    assert len(compilations) == len(set(compilations)), "one compilation for each structure"
    assert len({f.run for f in step.fused.values()}) == len(compilations) < len(step.fused)
    tight = planned(model, int(0.75 * step.plan.peak))
    assert all(map(torch.equal, trained(tight, x), grads))
    plan, resident = step_of(tight).plan, step_of(tight).planned.problem.resident
    assert plan.extra > 0
    model.zero_grad()
    assert abs(track(lambda: tight(x).backward()).peak(64) + resident - plan.peak) <= SLACK


def test_lengths_need_no_compilation_of_their_own(compilations: list[str]) -> None:
    model = layers(2)
    free = planned(model, "1GiB")
    trained(free, torch.randn(12, 40, 32, dtype=torch.bfloat16))
    count = len(compilations)
    tight = planned(model, int(0.8 * step_of(free).plan.peak))
    trained(tight, torch.randn(12, 40, 32, dtype=torch.bfloat16))
    assert step_of(tight).plan.extra > 0
    for length in (39, 33):
        x = torch.randn(11, length, 32, dtype=torch.bfloat16)
        found = trained(free, x)
        for grad, reference in zip(found, trained(model, x), strict=True):
            torch.testing.assert_close(grad, reference, rtol=0.05, atol=1e-3)
        assert all(map(torch.equal, trained(tight, x), found))
    assert len(compilations) == 2 * count > 0


def test_a_result_that_costs_no_more_to_make_than_to_read_is_in_every_group() -> None:
    x = torch.randn(6, 10, 32, dtype=torch.bfloat16)
    graph = captured_step(layers(1), (x,), {}).graph
    at = planned_sizes(graph)
    alone, repeated = (
        [_names(s.nodes) for s in read_joint(graph, 1, sizes).steps] for sizes in (None, at)
    )
    scaled = ["aten._to_copy.default", "aten.mul.Tensor"]
    assert scaled in alone and scaled not in repeated
    assert sum(step[:2] == scaled for step in repeated) >= 2, "the forward and a gradient"


def _names(nodes: Sequence[fx.Node]) -> list[str]:
    return [str(node.target) for node in nodes]


def test_what_cannot_be_compiled_runs_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(group: Group) -> Any:
        raise NotImplementedError("no such kernel\nmore")

    monkeypatch.setattr(fused_module, "compiled", refused)
    model, x = layers(1), torch.randn(5, 7, 32, dtype=torch.bfloat16)
    expected = trained(planned(model, "1GiB", fuse=False), x)
    torch._dynamo.reset()
    with pytest.warns(UserWarning, match=r"groups of operations .*Error: no such kernel$") as seen:
        found = trained(planned(model, "1GiB"), x)
    assert len([w for w in seen if "groups of operations" in str(w.message)]) == 1
    assert all(map(torch.equal, found, expected))


class _Shapes(nn.Module):
    """Transposed results, parts of inputs, reductions over several axes, an addition of nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        turned = (x * self.weight).transpose(1, 2).contiguous() + 0
        part = torch.cat([turned[:, :4].exp(), turned[:, 4:].neg()], 1)
        return torch.softmax(part * 1.0, 1).transpose(1, 2) @ torch.ones(8, 3)


def test_results_lie_as_they_were_captured_and_share_no_memory() -> None:
    captured = captured_step(_Shapes(), (torch.randn(5, 6, 8),), {})
    groups = groups_of(captured)
    assert len(groups) >= 3
    for group in groups.values():
        arguments = [_example(node) for node in group.inputs]
        result = compiled(group)(*arguments)
        expected = group.run(arguments)
        torch.testing.assert_close(result, expected)
        assert result.stride() == expected.stride() and result.storage_offset() == 0
        assert result.untyped_storage().nbytes() == expected.untyped_storage().nbytes()
        given = [a.untyped_storage().data_ptr() for a in arguments if torch.is_tensor(a)]
        assert result.untyped_storage().data_ptr() not in given


def _example(node: fx.Node) -> Any:
    value: Any = node.meta["val"]
    if not isinstance(value, torch.Tensor):
        return int(value.node.hint)
    sizes: Sequence[Any] = value.shape
    shape = [s.node.hint if hasattr(s, "node") else s for s in sizes]
    return torch.randn(shape).to(value.dtype)


def test_views_of_the_same_layout_are_left_out() -> None:
    module, x = nn.Linear(4, 4), torch.randn(3, 4)

    def run(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x[:].detach() @ w.t().t().t(), w.detach()

    from torch.fx.experimental.proxy_tensor import make_fx

    found = make_fx(run)(x, module.weight.detach())
    drop_idle_views(found.graph)
    found.recompile()
    names = [str(n.target) for n in found.graph.nodes if n.op == "call_function"]
    assert names == ["aten.t.default", "aten.mm.default", "aten.detach.default"]
    torch.testing.assert_close(found(x, module.weight)[0], x @ module.weight.t())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"memory_budget": "1GiB", "options": {"fuse_groups": 1}}, "fuse_groups"),
        ({"options": {"fuse_groups": True}}, "goes with memory_budget"),
    ],
)
def test_the_option_is_true_or_false_and_needs_a_budget(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(CompileError, match=message):
        moec.compile(layers(1), **settings)
