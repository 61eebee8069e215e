"""Groups of light operations compiled by TorchInductor, so that each is run as it is planned: it
reads what it takes and writes its result once.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import fx

from moec.budget.groups import Group, groups_of
from moec.budget.labels import label, operation
from moec.budget.measure import workspace_of_call
from moec.budget.problem import Sizes
from moec.budget.steps import Captured, Step
from moec.budget.values import number_at, tensor_at
from moec.surroundings import isolated

Function: TypeAlias = Callable[..., torch.Tensor]

# Results lie as the plan assumes, are in memory of their own, and have the same bits in every
# process: no layouts with gaps, no pools, no kernel of a reduction chosen by the clock.
SETTINGS: dict[str, Any] = {
    "comprehensive_padding": False,
    "memory_planning": False,
    "deterministic": True,
    "graph_partition": False,
    "triton.cudagraphs": False,
    "max_autotune": False,
    "cpp_wrapper": False,
}


@dataclass(frozen=True)
class Fused:
    """A step as one call of ``run`` on the values of ``inputs``; ``workspace``: bytes that it needs
    beyond them and its result at the planned sizes, or ``None`` where that is not known.
    """

    run: Function
    inputs: tuple[fx.Node, ...]
    workspace: int | None


def fused_steps(
    captured: Captured, sizes: Sizes, device: torch.device, warn: Callable[[str], None]
) -> dict[Step, Fused]:
    """The steps that one compiled function each executes; equal groups share one function.

    Each function is tried once at ``sizes``. What Inductor cannot compile is not in the result,
    so that its operations run one by one; ``warn`` is told once.
    """
    known: dict[str, tuple[Function, int | None] | None] = {}
    found: dict[Step, Fused] = {}
    failures: list[str] = []
    for step, group in groups_of(captured).items():
        key = group.key()
        if key not in known:
            known[key] = _tried(group, sizes, device, label(step.main, step.is_backward), failures)
        tried = known[key]
        if tried is not None:
            found[step] = Fused(tried[0], group.inputs, tried[1])
    if failures:
        warn(
            f"moec: {len(failures)} of {len(known)} groups of operations could not be compiled by"
            f" TorchInductor and run one by one; the first: {failures[0]}"
        )
    return found


def _tried(
    group: Group, sizes: Sizes, device: torch.device, name: str, failures: list[str]
) -> tuple[Function, int | None] | None:
    # A compiler may fail in any way, and the operations can run without it.
    try:
        run = isolated(lambda: compiled(group), device)
        arguments = [_at(node, sizes) for node in group.inputs]
        return run, workspace_of_call(run, arguments, device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        failures.append(f"{name}: {type(error).__name__}: {lines[0]}")
        return None


def _at(node: fx.Node, sizes: Sizes) -> Any:
    value = node.meta["val"]
    return tensor_at(value, sizes) if isinstance(value, torch.Tensor) else number_at(value, sizes)


def compiled(group: Group) -> Function:
    """One function for a group and for all sizes, of the group's tensors and sizes in order.

    Its symbols stay those of the capture, which learns what Inductor assumes of them.
    """
    from torch._guards import TracingContext, tracing
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.utils import BoxedBool

    mode = group.result.meta["val"].fake_mode
    with tracing(TracingContext(mode)), torch.no_grad(), config.patch(SETTINGS):
        module = traced(group)
        examples = [node.meta["val"] for node in group.inputs]
        code: Any = compile_fx_inner(module, examples, cudagraphs=BoxedBool(False))
    return _function(code, "fused_" + re.sub(r"\W", "_", operation(group.result)))


def _function(code: Any, name: str) -> Function:
    call = getattr(code, "current_callable", None) or code

    def run(*arguments: Any) -> torch.Tensor:
        result: torch.Tensor = call(list(arguments))[0]
        return result

    run.__name__ = name
    run.code = code  # type: ignore[attr-defined] # what is compiled lives as long
    return run


def traced(group: Group) -> fx.GraphModule:
    """A group in the operations that Inductor knows.

    Raises:
        RuntimeError: its result would show the memory of an input.
    """
    from torch._dispatch.python import enable_python_dispatcher
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    examples = [node.meta["val"] for node in group.inputs]

    def run(*arguments: Any) -> tuple[Any]:
        return (group.run(arguments),)

    with group.result.meta["val"].fake_mode, enable_python_dispatcher():
        module: fx.GraphModule = make_fx(run, decomposition_table=select_decomp_table())(*examples)
    _keep_layout(module.graph, group)
    return module


def _keep_layout(graph: fx.Graph, group: Group) -> None:
    """Ask for a result as it was captured: with the same strides, in memory of its own."""
    (output,) = graph.find_nodes(op="output")
    (result,) = output.args[0]
    given = {n.meta["val"].untyped_storage()._cdata for n in group.tensors}
    if result.meta["val"].untyped_storage()._cdata in given:
        raise RuntimeError("its result shows the memory of an input")
    output.meta["user_visible_output_idxs"] = [0]
    output.meta["original_output_strides"] = [group.result.meta["val"].stride()]


__all__ = ["SETTINGS", "Fused", "compiled", "fused_steps", "traced"]
