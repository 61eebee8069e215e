"""What would be compiled of a model, what not, why, and what to do: the report of ``moec doctor``.

A structure is a set of blocks with the same code, names and ranks of weights; a report has one
entry for each, with the number of blocks in the whole model.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from moec.api import advice, regions
from moec.api import compile as compile_model
from moec.capture.described import Description, Served, describe, served
from moec.capture.shrink import Census, census, signature
from moec.region import Region
from moec.reproducer import version_of

# Rows of this many bytes are what the copy engine and wide loads take.
_ALIGNMENT = 16
_LARGE_RANK = 2


@dataclass(frozen=True)
class Structure:
    """One kind of block: what it is, how many there are, and what becomes of it."""

    kind: str
    count: int
    first: str
    inference: str
    training: str
    reason: str
    advice: str
    router: str
    experts: str
    dtypes: tuple[str, ...]
    served: tuple[Served, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """The structures of a model, and what is to be said of this installation."""

    model: str
    note: str
    structures: tuple[Structure, ...]
    warnings: tuple[str, ...]
    versions: tuple[tuple[str, str], ...]

    @property
    def is_well(self) -> bool:
        """Whether there is a MoE block and none stays as it was, in inference and in training."""
        left = "left as it was"
        states = [s for one in self.structures for s in (one.inference, one.training)]
        return bool(states) and left not in states

    def as_json(self) -> dict[str, Any]:
        """Plain values: mappings, lists, texts and numbers."""
        return {**asdict(self), "versions": dict(self.versions), "well": self.is_well}


def diagnose(model: nn.Module, whole: nn.Module | None = None, note: str = "") -> Report:
    """The report of a model; ``whole`` is the one that a smaller ``model`` stands for."""
    modes = {mode: _regions(model, mode) for mode in (False, True)}
    kinds = {type(r.candidate.module)._moec_original for r in modes[False]}  # type: ignore[attr-defined]
    counted = census(whole if whole is not None else model, kinds)
    groups: dict[Any, list[int]] = {}
    for place, region in enumerate(modes[False]):
        groups.setdefault((signature(region.candidate.module), region.status), []).append(place)
    structures = [
        _structure(key[0], [modes[mode][places[0]] for mode in modes], len(places), counted)
        for key, places in groups.items()
    ]
    return Report(
        type(model).__name__,
        note,
        tuple(structures),
        tuple(_unseen(counted, groups) + _installation()),
        tuple((name, version_of(name)) for name in ("moec", "torch", "triton", "transformers")),
    )


def _regions(model: nn.Module, training: bool) -> list[Region]:
    """The regions of a compiled copy in one mode; the model's own mode is put back."""
    before = [(m, m.training) for m in model.modules()]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the report says what the warnings say
            return regions(compile_model(model.train(training)))
    finally:
        for module, mode in before:
            module.training = mode


def _structure(key: Any, found: Sequence[Region], here: int, counted: Census) -> Structure:
    inference, training = found
    module = inference.candidate.module
    graph = _graph(inference)
    words = describe(graph) if graph is not None else Description("", "")
    reason = inference.reason or training.reason
    return Structure(
        type(module).__name__,
        counted.counts.get(key, here),
        counted.places.get(key, inference.name) or "(the model)",
        inference.status,
        training.status,
        reason,
        advice(inference if inference.reason else training) if reason else "",
        words.router,
        words.experts,
        tuple(sorted({str(p.dtype).removeprefix("torch.") for p in module.parameters()})),
        tuple(served(graph, training=True)) if graph is not None else (),
        tuple(_sizes(counted.sizes.get(key, ()))),
    )


def _graph(region: Region) -> Any:
    for one in (region, region.inner):
        if one is not None and one.first is not None and one.first.graph is not None:
            return one.first.graph
    return None


def _sizes(shapes: Sequence[tuple[int, ...]]) -> list[str]:
    """What is wrong with the sizes of a block's weights, in half precision."""
    step = _ALIGNMENT // 2
    odd = sorted({s for s in shapes if len(s) >= _LARGE_RANK and s[-1] % step})
    return [
        f"weights of {list(shape)} have rows that are no multiple of {_ALIGNMENT} bytes in half "
        "precision: the kernels with the copy engine do not take them"
        for shape in odd
    ]


def _unseen(counted: Census, groups: dict[Any, list[int]]) -> list[str]:
    known = {key for key, _ in groups}
    return [
        f"{counted.places[key]} ({count} of its kind) has a structure that the small model lacks; "
        "nothing is said of it"
        for key, count in counted.counts.items()
        if key not in known
    ]


def _installation() -> list[str]:
    found = []
    if importlib.util.find_spec("triton") is None:
        found.append("triton is not installed: library calls serve GPUs; pip install triton")
    elif not torch.cuda.is_available():
        found.append("there is no GPU here: kernels were generated, and not compiled")
    return found
