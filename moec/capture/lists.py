"""Lists of experts: which child of a block is one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from moec.capture.counts import takes_rows
from moec.structure import names_read

_LISTS = (nn.ModuleList, nn.ModuleDict)
# Code that picks rows mentions one of these; a stack of layers mentions none.
PICKING = {
    "argsort",
    "bincount",
    "index_add",
    "index_add_",
    "index_put_",
    "index_select",
    "masked_select",
    "nonzero",
    "one_hot",
    "scatter",
    "scatter_add",
    "scatter_add_",
    "tolist",
    "where",
}


def expert_list(module: nn.Module) -> tuple[str, list[nn.Module]] | None:
    """The path and members of a list of at least two experts that a module's own code calls.

    The list may be in containers without code of their own. Something must score the experts or
    pick rows for them.
    """
    if not has_code(module):
        return None
    for name, owner in _lists(module):
        members = list(owner.children())
        if _are_experts(members) and _routes(module, name, members):
            return name, members
    return None


def has_expert_list(module: nn.Module) -> bool:
    """Whether a module holds a list of experts itself and something that scores them."""
    return expert_list(module) is not None


def has_code(module: nn.Module) -> bool:
    """Whether a module can be called: containers have no forward."""
    return type(module).forward is not nn.Module.forward


def _lists(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        full = f"{path}.{name}" if path else name
        if isinstance(child, _LISTS):
            yield full, child
        if not has_code(child):
            yield from _lists(child, full)


def _are_experts(members: Sequence[nn.Module]) -> bool:
    """Whether modules are called on rows alone, and most of them have weights."""
    weighty = [m for m in members if any(True for _ in m.parameters())]
    return len(weighty) > 1 and all(takes_rows(m) for m in members)


def _routes(module: nn.Module, experts: str, members: Sequence[nn.Module]) -> bool:
    """Whether something scores the experts; or equal ones have rows picked for them."""
    if is_scored(module, experts, len(members)):
        return True
    cls: Any = type(module)
    same = len({type(m) for m in members}) == 1
    return same and not names_read(cls).isdisjoint(PICKING)


def is_scored(module: nn.Module, experts: str, count: int) -> bool:
    """Whether a matrix outside the experts has as many rows or columns as there are experts."""
    outside = [p for n, p in module.named_parameters() if not n.startswith(f"{experts}.")]
    return any(p.dim() == 2 and count in p.shape for p in outside)


__all__ = ["PICKING", "expert_list", "has_code", "has_expert_list", "is_scored"]
