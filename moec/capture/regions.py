"""Finding the MoE regions of a model: by structure, then by reading their code."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import replace

import torch
from torch import nn

from moec.capture.capturing import capture_experts, capture_whole
from moec.capture.check import (
    unchanged,
)
from moec.capture.dense_blocks import DenseForm, dense_form
from moec.capture.found import Candidate, FoundRegion, join
from moec.capture.lists import expert_list, has_expert_list, is_scored
from moec.capture.reading import read_experts
from moec.capture.stacks import stacked_experts
from moec.capture.wrappers import core_of, own_weights
from moec.errors import MoecError


def find_candidates(model: nn.Module) -> Iterator[Candidate]:
    """Modules that look like MoE regions, outermost first, none inside another.

    A block has a child that takes three tensors and holds stacked or listed experts; a loop block
    holds a list of experts itself; a dense block holds weights by expert and what scores them.
    """
    taken: set[nn.Module] = set()
    tried: dict[Hashable, DenseForm | None] = {}
    for name, module in model.named_modules():
        if module in taken:
            continue
        experts = experts_below(module)
        known = experts is not None or _surely_experts(module) or _is_loop(module)
        dense = None if known else dense_form(module, tried)
        if known or dense is not None:
            yield Candidate(name, module, experts, dense)
            taken.update(module.modules())


def experts_below(module: nn.Module) -> str | None:
    """The name of the child that is an experts module, if there is one."""
    return next((n for n, child in module.named_children() if _surely_experts(child)), None)


def _surely_experts(module: nn.Module) -> bool:
    """Whether a module has the experts contract, by more than its shape if one stacked weight is
    all it has.

    Tables of position embeddings are of rank 3 too, in modules that take three tensors.
    """
    if not is_experts(module):
        return False
    if sum(p.dim() == 3 for p in own_weights(module)) > 1:
        return True
    try:
        with unchanged(module):
            read_experts(module)
    except MoecError:
        return False
    return True


def _is_loop(module: nn.Module) -> bool:
    """Whether a module holds a list of experts, and none of its submodules is a region itself."""
    inside = (m for m in module.modules() if m is not module)
    holds = has_expert_list(module) or stacked_experts(module) is not None
    if not holds or any(_surely_experts(m) or has_expert_list(m) for m in inside):
        return False
    return _has_scores(module) or _is_captured(module)


def _has_scores(module: nn.Module) -> bool:
    """Whether a matrix has a row for each expert: without one, a list may be one of layers."""
    found = expert_list(module)
    count = len(found[1]) if found is not None else stacked_experts(module)
    return count is not None and is_scored(module, found[0] if found is not None else "-", count)


def _is_captured(module: nn.Module) -> bool:
    """Whether a module that may be a block turns out to be one."""
    candidate = Candidate("", module, None)
    return any(capture_whole(candidate, None, rank).graph is not None for rank in (3, 2))


def is_experts(module: nn.Module) -> bool:
    """Whether a module has the experts contract, by itself or around a module that has it."""
    return core_of(module) is not None


def find_regions(model: nn.Module) -> list[FoundRegion]:
    """Every region of a model with its imported IR, or the reason why it stays as it is.

    Structurally equal blocks are captured each; compare ``fingerprint`` to compile each structure
    once.
    """
    return [capture(candidate) for candidate in find_candidates(model)]


def capture(candidate: Candidate, dtype: torch.dtype | None = None, rank: int = 3) -> FoundRegion:
    """Capture one candidate for tokens of ``dtype`` (default: its parameters') and ``rank``.

    Falls back from the whole block to its experts alone; what cannot be read has ``graph=None``.
    """
    if candidate.is_experts:
        return capture_experts(candidate, dtype)
    found = capture_whole(candidate, dtype, rank)
    if found.graph is not None or candidate.experts is None:
        return found
    inner = replace(
        candidate,
        name=join(candidate.name, candidate.experts),
        module=candidate.module.get_submodule(candidate.experts),
    )
    fallback = capture_experts(inner, dtype)
    return replace(fallback, reason=found.reason if fallback.graph is not None else fallback.reason)


__all__ = [
    "Candidate",
    "FoundRegion",
    "capture",
    "capture_experts",
    "capture_whole",
    "find_candidates",
    "find_regions",
]
