"""Blocks that stay as they were because of what they hold: experts that differ, weights on several
devices.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from torch import nn

from moec.errors import CaptureError
from moec.structure import settings_read, structure_key

_PLAIN = (int, float, str, bool)


def refuse_split_devices(module: nn.Module) -> None:
    """Raise :class:`CaptureError` that names a weight on each device, if there are several."""
    first: dict[str, str] = {}
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        first.setdefault(str(tensor.device), name)
    if len(first) > 1:
        places = " and ".join(f"{name} on {device}" for device, name in first.items())
        raise CaptureError(
            f"{type(module).__name__} has weights on several devices ({places}); a region runs on "
            "one: move the whole block to one device before compiling"
        )


def odd_experts(model: nn.Module, taken: Collection[nn.Module]) -> Iterator[tuple[str, str]]:
    """Path and reason for each block outside ``taken`` whose list of experts has odd members.

    A list counts as experts if more than half of its members are equal and a child of the same
    module scores as many things as there are members.
    """
    for path, module in model.named_modules():
        if module not in taken:
            for name, child in module.named_children():
                is_list = isinstance(child, nn.ModuleList | nn.ModuleDict) and len(child) > 1
                if is_list and _is_scored(module, name, len(list(child.children()))):
                    reason = _difference(name, child)
                    if reason:
                        yield path, reason


def _is_scored(module: nn.Module, experts: str, count: int) -> bool:
    own = [(n, p) for n, p in module.named_parameters() if not n.startswith(f"{experts}.")]
    return any(p.dim() == 2 and p.shape[0] == count and n.count(".") <= 2 for n, p in own)


def _difference(name: str, members: nn.Module) -> str:
    """How the first odd member differs from the usual ones; empty if none does, or if most do."""
    named = list(members._modules.items())
    keys = [structure_key(m) if m is not None else None for _, m in named]
    usual, times = Counter(keys).most_common(1)[0]
    if times == len(keys) or 2 * times <= len(keys):
        return ""
    model = named[keys.index(usual)]
    odd = named[next(i for i, key in enumerate(keys) if key != usual)]
    if model[1] is None or odd[1] is None:
        return ""
    what = next(_differences(odd[1], model[1]), "it runs other code")
    return (
        f"{name}.{odd[0]} differs from {name}.{model[0]}: {what}; experts of one list must be "
        "equal but for the values of their weights"
    )


def _differences(odd: nn.Module, usual: nn.Module) -> Iterator[str]:
    if type(odd) is not type(usual):
        yield f"it is a {type(odd).__name__}, not a {type(usual).__name__}"
    yield from _tensor_differences(odd, usual)
    for (path, mine), (_, theirs) in zip(odd.named_modules(), usual.named_modules(), strict=False):
        yield from _setting_differences(path, settings_read(mine), settings_read(theirs))


def _tensor_differences(odd: nn.Module, usual: nn.Module) -> Iterator[str]:
    mine, theirs = (
        {n: t for n, t in (*m.named_parameters(), *m.named_buffers())} for m in (odd, usual)
    )
    for name in [*mine, *(n for n in theirs if n not in mine)]:
        if name not in theirs:
            yield f"it has {name}, which the others lack"
        elif name not in mine:
            yield f"it lacks {name}"
        elif mine[name].dtype != theirs[name].dtype:
            yield f"{name} is {_word(mine[name].dtype)}, not {_word(theirs[name].dtype)}"
        elif mine[name].shape != theirs[name].shape:
            yield f"{name} is {list(mine[name].shape)}, not {list(theirs[name].shape)}"
        elif mine[name].device != theirs[name].device:
            yield f"{name} is on {mine[name].device}, not on {theirs[name].device}"


def _setting_differences(
    path: str, mine: Sequence[tuple[str, Any]], theirs: Sequence[tuple[str, Any]]
) -> Iterator[str]:
    usual = dict(theirs)
    for name, value in mine:
        other = usual.get(name)
        plain = isinstance(value, _PLAIN) and isinstance(other, _PLAIN)
        if value is not other and not (plain and value == other):
            where = f"{path}.{name}".lstrip(".")
            yield f"{where} is {_word(value)}, not {_word(other)}"


def _word(value: Any) -> str:
    if isinstance(value, _PLAIN):
        return repr(value)
    return str(getattr(value, "__name__", value)).removeprefix("torch.")
