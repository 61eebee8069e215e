"""The IR after each pass in PyTorch's structured trace, which ``TORCH_TRACE`` writes."""

from __future__ import annotations

import re
from collections.abc import Callable

from torch._logging._internal import trace_structured

from moec.ir.graph import Graph
from moec.ir.text import show
from moec.manager import PassCall, Step
from moec.observers import Observer, summary

_UNSAFE = re.compile(r"[^A-Za-z0-9]+")


def artifact(name: str, text: Callable[[], str]) -> None:
    """Add a text under a name to the structured trace, if there is one."""
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": _UNSAFE.sub("_", f"moec_{name}"), "encoding": "string"},
        payload_fn=text,
        expect_trace_id=False,  # most regions are compiled outside torch.compile
    )


class TorchTrace(Observer):
    """Put the input and the graph after each pass that changed it into the structured trace."""

    def __init__(self, name: str) -> None:
        self.name = name

    def before(self, call: PassCall, graph: Graph, index: int) -> None:
        if index == 0:
            artifact(f"{self.name}_00_input", lambda: show(graph))

    def after(self, step: Step, index: int) -> None:
        if step.changed:
            name = f"{self.name}_{index + 1:02}_{step.call.definition.name}"
            artifact(name, lambda: f"// {summary(step)}\n{show(step.after)}")


__all__ = ["TorchTrace", "artifact"]
