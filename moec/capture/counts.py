"""How many experts a module has and how wide its tokens are: candidates, to be tried in order."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from torch import nn

from moec.errors import CaptureError

LISTS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList)
_MODULE_LISTS = (nn.ModuleList, nn.ModuleDict)
_PARAMETRIZED = "parametrizations"  # where torch keeps what computes a module's weights


def expert_counts(module: nn.Module) -> list[int]:
    """Candidates for the number of experts, likely ones first.

    The length of a list of modules, the first size of stacked weights, or a number on the module
    into whose equal parts the rows of its matrices can be cut.
    """
    counts = [*_lengths(module)]
    stacked = [t.shape[0] for _, t in module.named_parameters() if t.dim() == 3]
    counts += sorted(stacked, reverse=True) if not counts else []
    counts += _numbers(module) if not counts else []
    found = list(dict.fromkeys(int(n) for n in counts if n > 1))
    if not found:
        raise CaptureError(
            f"{type(module).__name__} has no stacked weights of one number of experts"
        )
    return found


def _lengths(module: nn.Module) -> Iterator[int]:
    for owner in (module, *_children(module)):
        if isinstance(owner, _MODULE_LISTS):
            yield len(owner)
            yield len(with_weights(owner))


def _children(module: nn.Module) -> list[nn.Module]:
    """A module's children, without what computes its weights."""
    return [child for name, child in module.named_children() if name != _PARAMETRIZED]


def with_weights(owner: nn.Module) -> list[str]:
    """The names of children that have parameters."""
    return [k for k, child in owner.named_children() if any(True for _ in child.parameters())]


def _numbers(module: nn.Module) -> list[int]:
    rows = {t.shape[0] for t in flat_weights(module)}
    numbers = {v for v in vars(module).values() if isinstance(v, int) and 1 < v < 2**20}
    whole = [n for n in numbers if all(r % n == 0 and r > n for r in rows)] if rows else []
    # The number of experts times their width is the number of rows, so both divide it.
    named = {k: v for k, v in vars(module).items() if "expert" in k and v in whole}
    return [*named.values(), *sorted(whole)]


def flat_weights(module: nn.Module) -> list[nn.Parameter]:
    """Matrices that modules hold as parameters of their own, and not as linear layers."""
    return [
        p
        for m in module.modules()
        if not type(m).__module__.startswith("torch.")
        for p in m.parameters(recurse=False)
        if p.dim() == 2
    ]


def may_hold_experts(module: nn.Module) -> bool:
    """Whether a module has weights of several experts, as far as their shapes say.

    Stacked weights; a list of equal modules that take rows alone; or matrices whose rows a number
    on the module cuts in parts.
    """
    if any(p.dim() == 3 for p in module.parameters(recurse=False)):
        return True
    if any(_is_list_of_experts(owner) for owner in (module, *_children(module))):
        return True
    holds_layers = any(isinstance(m, nn.Linear) for m in module.modules())
    return not holds_layers and len(flat_weights(module)) > 1 and bool(_numbers(module))


def _is_list_of_experts(owner: nn.Module) -> bool:
    if not isinstance(owner, _MODULE_LISTS):
        return False
    members = [owner.get_submodule(name) for name in with_weights(owner)]
    return (
        len(members) > 1
        and len({type(m) for m in members}) == 1
        and all(takes_rows(m) for m in members)
    )


def takes_rows(module: nn.Module) -> bool:
    """Whether one tensor is all that a module must be called with."""
    if any(map(_holds_blocks, module.modules())):
        return False
    parameters = list(inspect.signature(inspect.unwrap(type(module).forward)).parameters.values())
    open_ended = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    required = [p for p in parameters[1:] if p.default is p.empty and p.kind not in open_ended]
    return len(required) == 1


def _holds_blocks(module: nn.Module) -> bool:
    """Whether a module is a list of more than plain layers, such as those of an adapter."""
    if isinstance(module, nn.ModuleDict):
        return any(True for member in module.values() for _ in member.children())
    return isinstance(module, nn.ModuleList)


def expert_keys(owner: nn.Module, experts: int) -> list[str] | None:
    """The names of a list's members that are the experts; ``None`` if they are not that many."""
    if isinstance(owner, nn.ParameterList):
        return [str(e) for e in range(len(owner))] if len(owner) == experts else None
    if not isinstance(owner, _MODULE_LISTS):
        return None
    keys = list(owner._modules)
    weighty = with_weights(owner)
    return next((k for k in (keys, weighty) if len(k) == experts), None)


def hidden_sizes(module: nn.Module) -> list[int]:
    """Candidates for the size of a token, likely ones first."""
    named = [
        getattr(module, n, None)
        for n in ("hidden_dim", "hidden_size", "dim", "d_model", "embed_dim")
    ]
    tensors = [*module.parameters(), *(b for b in module.buffers() if b.is_floating_point())]
    sizes = [s for t in tensors if t.dim() >= 2 for s in t.shape[-2:]]
    return list(dict.fromkeys(int(s) for s in [*named, *sizes] if isinstance(s, int)))


__all__ = [
    "LISTS",
    "expert_counts",
    "expert_keys",
    "flat_weights",
    "hidden_sizes",
    "may_hold_experts",
]
