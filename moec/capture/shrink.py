"""A small model of the structure that a checkpoint's configuration has.

The model of the configuration is built without memory for its weights. Of its layers those at the
beginning are kept, up to the first of the last kind; of the experts a few; the inner widths become
small. What the small model's blocks are called, read and hold is compared with the large one's.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from moec.families.discover import EXPERT_FIELDS, inner_configs

_LAYER = re.compile(r"^(?P<stack>.*?)\.(?P<number>\d+)$")
_NUMBER = re.compile(r"\.\d+\b")
# Inner widths of experts and of dense layers, on which no other size depends.
_WIDTH = re.compile(r"(intermediate_size|ffn_hidden_size|ffn_dim|d_ff)$")
_SMALL_WIDTH = 128
_FEWEST_EXPERTS = 8
_CHOICES = ("num_experts_per_tok", "moe_topk", "moe_k", "moe_top_k", "top_k_experts")


@dataclass(frozen=True)
class Census:
    """The modules of a model by their structure: how often each is there and where first."""

    counts: dict[Any, int] = field(default_factory=dict)
    places: dict[Any, str] = field(default_factory=dict)
    sizes: dict[Any, tuple[tuple[int, ...], ...]] = field(default_factory=dict)


def signature(module: nn.Module) -> Any:
    """Equal for modules of the same classes with parameters of the same names, ranks and dtypes.

    Sizes do not count, nor how many equal members a list has.
    """
    classes = {(_NUMBER.sub(".*", f".{n}"), _original(m)) for n, m in module.named_modules()}
    tensors = {(_NUMBER.sub(".*", f".{n}"), t.dim(), t.dtype) for n, t in module.named_parameters()}
    return frozenset(classes), frozenset(tensors)


def _original(module: nn.Module) -> type:
    return getattr(module, "_moec_original", type(module))


def census(model: nn.Module, wanted: set[type]) -> Census:
    """The modules of some classes in a model, counted by structure."""
    found = Census()
    for name, module in model.named_modules():
        if _original(module) in wanted:
            key = signature(module)
            found.counts[key] = found.counts.get(key, 0) + 1
            found.places.setdefault(key, name)
            found.sizes.setdefault(key, tuple(tuple(p.shape) for p in module.parameters()))
    return found


def shrunk_config(config: Any, whole: nn.Module) -> Any:
    """A copy of a configuration with fewer layers, fewer experts and small inner widths."""
    small = copy.deepcopy(config)
    for one in (small, *inner_configs(small)):
        _shrink(one, whole)
    return small


def _shrink(config: Any, whole: nn.Module) -> None:
    experts = _few_experts(config)
    for name, value in list(vars(config).items()):
        if name in EXPERT_FIELDS:
            setattr(config, name, _mapped(value, experts))
        elif _WIDTH.search(name):
            setattr(config, name, _mapped(value, _SMALL_WIDTH))
    total = getattr(config, "num_hidden_layers", None)
    if isinstance(total, int):
        layers = _layers_needed(whole, total)
        if layers is not None:
            _keep_layers(config, layers, total)


def _mapped(value: Any, limit: int) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_mapped(v, limit) for v in value)
    return min(value, limit) if isinstance(value, int) and not isinstance(value, bool) else value


def _few_experts(config: Any) -> int:
    """As few experts as the number of choices and the groups of experts let be told apart."""
    choices = [getattr(config, n, None) for n in _CHOICES]
    flat = [c for v in choices for c in (v if isinstance(v, list | tuple) else [v])]
    groups = getattr(config, "n_group", None) or 1
    least = max(_FEWEST_EXPERTS, 2 * groups, *(2 * c for c in flat if isinstance(c, int)))
    return -(-least // groups) * groups


def _layers_needed(whole: nn.Module, total: int) -> int | None:
    """How many first layers have every kind of layer, in the stacks that have ``total``."""
    needed = None
    for stack in _stacks(whole, total):
        kinds: dict[Any, int] = {}
        for number, layer in enumerate(stack):
            kinds.setdefault(signature(layer), number)
        needed = max(needed or 0, *kinds.values()) if len(kinds) > 1 else (needed or 0)
    return None if needed is None else max(needed + 1, 2)


def _stacks(whole: nn.Module, total: int) -> Iterator[nn.ModuleList]:
    for module in whole.modules():
        if isinstance(module, nn.ModuleList) and len(module) == total:
            yield module


def _keep_layers(config: Any, layers: int, total: int) -> None:
    per_layer = {
        n: v
        for n, v in vars(config).items()
        if isinstance(v, list | tuple)
        and len(v) == total
        and n not in EXPERT_FIELDS | set(_CHOICES)
    }
    for name, value in {
        **{n: v[:layers] for n, v in per_layer.items()},
        "num_hidden_layers": min(layers, total),
    }.items():
        setattr(config, name, value)
