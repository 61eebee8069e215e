"""A place that may be a region of a model, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from moec.call_form import TOKENS_ALONE, CallForm
from moec.capture.dense_blocks import DenseForm
from moec.capture.wrappers import core_of
from moec.capture.writes import Write
from moec.ir.graph import Graph
from moec.result_form import ONE_TENSOR, ResultForm


@dataclass(frozen=True)
class FoundRegion:
    """A region of a model: a MoE block, or the experts inside one whose router could not be read.

    ``graph`` is the imported forward IR (``None`` if the module stays as it is, then ``reason``
    says why); ``weights`` are the parameter paths, relative to the module, of the graph's inputs
    after the data; ``form`` is the form of the calls that it serves, ``result`` that of the
    module's result. ``ran`` says whether the module's own code ran when it was tried; ``writes``
    are attributes that a call sets; ``ranks`` are those of the tokens that it can be called with.
    ``kind`` is "block" (called with tokens), "experts" (tokens, indices, weights) or "loop".
    """

    name: str
    module: nn.Module
    kind: str
    graph: Graph | None
    weights: tuple[str, ...] = ()
    reason: str = ""
    result: ResultForm = ONE_TENSOR
    form: CallForm = TOKENS_ALONE
    ran: bool = True
    writes: tuple[Write, ...] = ()
    ranks: tuple[int, ...] = (2, 3)

    @property
    def fingerprint(self) -> str:
        """Equal for regions that can share one compiled artifact."""
        return "" if self.graph is None else self.graph.fingerprint


@dataclass(frozen=True)
class Candidate:
    """A place in the module tree that looks like a region; ``experts`` is the path of the experts
    below it; ``dense`` says how a block without such experts and without a loop is called.
    """

    name: str
    module: nn.Module
    experts: str | None
    dense: DenseForm | None = None

    @property
    def is_experts(self) -> bool:
        """Whether the module itself is called with tokens, indices and weights."""
        return self.experts is None and self.dense is None and core_of(self.module) is not None


def join(*parts: str) -> str:
    """A module path from its parts."""
    return ".".join(p for p in parts if p)


__all__ = ["Candidate", "FoundRegion", "join"]
