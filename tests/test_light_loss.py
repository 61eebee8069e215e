"""Cross entropy in light operations: as accurate as PyTorch's, and nothing in float32 is held."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import default_partition

import moec
from moec.budget.light_loss import with_light_losses
from moec.budget.model_plan import capture_model
from moec.compiled import model_scope_of
from tests.models import build

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore:Your compiler for AOTAutograd:UserWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is:DeprecationWarning"),
]
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def gradient(loss: Loss, logits: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
    """A loss and the gradient of the logits."""
    rows = logits.clone().requires_grad_()
    value = loss(rows, labels)
    value.backward()  # type: ignore[no-untyped-call]
    assert rows.grad is not None
    return [value.detach(), rows.grad]


def lightened(loss: Loss, targets: list[str]) -> Loss:
    """A loss whose joint graph is rewritten; ``targets`` gets its operations."""

    def partition(joint: fx.GraphModule, inputs: Any, *, num_fwd_outputs: int, **_: Any) -> Any:
        with_light_losses(joint.graph)
        joint.graph.lint()
        joint.recompile()
        targets.extend(str(n.target) for n in joint.graph.nodes)
        return default_partition(joint, inputs, num_fwd_outputs=num_fwd_outputs)

    backend = aot_autograd(
        fw_compiler=lambda module, _: module.forward,
        bw_compiler=lambda module, _: module.forward,
        partition_fn=partition,
    )
    return torch.compile(loss, backend=backend)


def drawn(rows: int, classes: int, dtype: torch.dtype, ignored: int) -> tuple[torch.Tensor, ...]:
    """Logits and labels, of which every third one is ignored."""
    torch.manual_seed(rows)
    labels = torch.randint(0, classes, (rows,))
    labels[::3] = ignored
    return 3 * torch.randn(rows, classes, dtype=dtype), labels


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("rows", "classes", "ignored"), [(7, 5, -100), (64, 1000, -100), (5, 50304, -100), (9, 10, 0)]
)
def test_it_is_as_accurate_as_the_operations_in_its_place(
    rows: int, classes: int, ignored: int, dtype: torch.dtype, reduction: str
) -> None:
    logits, labels = drawn(rows, classes, dtype, ignored)

    def loss(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        wide = x if x.dtype is torch.float64 else x.float()
        return 1.7 * F.cross_entropy(wide, t, ignore_index=ignored, reduction=reduction)

    targets = list[str]()
    found = gradient(lightened(loss, targets), logits, labels)
    expected = gradient(loss, logits, labels)
    exact = gradient(loss, logits.double(), labels)
    assert not any("nll_loss" in t or "log_softmax" in t for t in targets)
    for value, before, reference in zip(found, expected, exact, strict=True):
        assert value.dtype is before.dtype
        scale = reference.norm()
        error, allowed = ((v.double() - reference).norm() / scale for v in (value, before))
        assert error <= 1.2 * allowed + 2e-7


def test_rows_that_are_all_ignored_have_pytorchs_result() -> None:
    logits, labels = torch.randn(4, 6), torch.full((4,), -100)
    for reduction in ("mean", "sum"):

        def loss(x: torch.Tensor, t: torch.Tensor, how: str = reduction) -> torch.Tensor:
            return F.cross_entropy(x, t, reduction=how)

        torch._dynamo.reset()
        found, expected = (
            gradient(lightened(loss, []), logits, labels),
            gradient(loss, logits, labels),
        )
        for value, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(value, wanted, equal_nan=True, rtol=0, atol=0)


def test_a_class_of_no_probability_counts_only_where_it_is_the_label() -> None:
    logits, labels = torch.randn(4, 6), torch.tensor([1, 2, -100, 3])
    logits[:, 5] = -torch.inf
    targets = list[str]()
    found = gradient(lightened(F.cross_entropy, targets), logits, labels)
    for value, wanted in zip(found, gradient(F.cross_entropy, logits, labels), strict=True):
        torch.testing.assert_close(value, wanted)


def test_a_label_that_is_no_class_shows() -> None:
    logits, labels = torch.randn(4, 6), torch.tensor([1, 6, 2, 3])
    assert gradient(lightened(F.cross_entropy, []), logits, labels)[0].isnan()


def test_weights_of_classes_and_no_reduction_stay_as_they_are() -> None:
    logits, labels = torch.randn(4, 6), torch.tensor([1, 5, 2, 3])
    weights = torch.rand(6)
    losses: list[Loss] = [
        lambda x, t: F.cross_entropy(x, t, weight=weights),
        lambda x, t: (F.cross_entropy(x, t, reduction="none") * torch.arange(4)).sum(),
    ]
    for loss in losses:
        torch._dynamo.reset()
        targets = list[str]()
        found = gradient(lightened(loss, targets), logits, labels)
        assert any("nll_loss" in t for t in targets)
        for value, wanted in zip(found, gradient(loss, logits, labels), strict=True):
            assert torch.equal(value, wanted)


class _Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(16, 16), nn.Linear(16, 300, bias=False)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = self.head(self.inner(x)).float()
        return F.cross_entropy(logits.view(-1, 300), labels.view(-1))


def test_logarithms_that_something_else_reads_are_there_for_it() -> None:
    def loss(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        logarithms = x.log_softmax(-1)
        return F.nll_loss(logarithms, t) + (logarithms * logarithms.exp()).sum()

    logits, labels = drawn(8, 12, torch.float32, -100)
    found = gradient(lightened(loss, []), logits, labels)
    for value, wanted in zip(found, gradient(loss, logits, labels), strict=True):
        torch.testing.assert_close(value, wanted)


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor compiles with g++ on a CPU")
@pytest.mark.filterwarnings("ignore:moec. found no MoE block")
def test_a_planned_step_holds_no_logarithms() -> None:
    torch.manual_seed(0)
    model = _Classifier().bfloat16()
    x, labels = torch.randn(6, 8, 16).bfloat16(), torch.randint(0, 300, (6, 8))
    options = {"plan_seconds": 1, "fuse_groups": True}
    planned: Any = moec.compile(model, memory_budget="1GiB", options=options)
    grads = []
    for run in (planned, model):
        model.zero_grad()
        value = run(x, labels)
        value.backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for found, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0.05, atol=1e-3)
    scope: Any = model_scope_of(planned)
    (compiled,) = scope.steps.values()
    nodes = compiled.step.planned.problem.nodes
    assert max(size for node in nodes for size in node.outputs) == 6 * 8 * 300 * 2


@pytest.mark.parametrize("target", ["triton", "aten"])
def test_a_plan_counts_on_it_where_groups_are_compiled(target: str) -> None:
    graph = capture_model(build("olmoe"), 2, 48, target).captured.graph
    has_loss = any("nll_loss" in str(node.target) for node in graph.nodes)
    assert has_loss == (target == "aten")
