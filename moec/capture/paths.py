"""Which parameters of an experts module are one expert's own, by their paths."""

from __future__ import annotations

from torch import nn

from moec.capture.counts import expert_keys


def pattern_of(module: nn.Module, name: str, expert: int, experts: int) -> str:
    """A parameter's path with ``*`` in place of the expert whose it is."""
    parts = name.split(".")
    place = _place(module, parts, experts)
    if place is not None and parts[place] == _keys(module, parts[:place], experts)[expert]:
        parts[place] = "*"
    return ".".join(parts)


def paths_of(
    module: nn.Module, source: str, first: int, stop: int, experts: int
) -> tuple[str, ...] | None:
    """The paths of the parameters that correspond to the first expert's, one an expert up to
    ``stop``; ``None`` for a parameter that is no expert's own.
    """
    parts = source.split(".")
    place = _place(module, parts, experts)
    if place is None or parts[place] != _keys(module, parts[:place], experts)[first]:
        return None
    keys = _keys(module, parts[:place], experts)[first:stop]
    return tuple(".".join([*parts[:place], key, *parts[place + 1 :]]) for key in keys)


def _place(module: nn.Module, parts: list[str], experts: int) -> int | None:
    """Which part of a parameter's path names the expert: that below the outermost list of all."""
    for place in range(len(parts)):
        owner = module.get_submodule(".".join(parts[:place]))
        if expert_keys(owner, experts) is not None:
            return place
    return None


def _keys(module: nn.Module, parts: list[str], experts: int) -> list[str]:
    return expert_keys(module.get_submodule(".".join(parts)), experts) or []


__all__ = ["paths_of", "pattern_of"]
