"""One row of the table of families: a tiny model compiled and compared with itself, eager."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from moec.api import compile as compile_model
from moec.api import regions
from moec.capture.described import describe
from moec.errors import MoecError
from moec.families.discover import Family
from moec.families.inputs import fill, first_tensor, inputs_for
from moec.families.tiny import build
from moec.region import Region

# Largest relative errors in float32: of the output, and of all gradients against the largest one.
TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4


_NOTHING = "no module takes tokens, indices and weights, and none loops over a list of experts"


@dataclass(frozen=True)
class Row:
    """What became of one family: distinct routers and experts, what is compiled, and why not."""

    family: str
    router: str
    experts: str
    compiled: str
    same: str
    reason: str


def row_of(family: Family) -> Row:
    """Build, compile, run and compare the tiny model of a family."""
    try:
        model = tiny_model(family)
    except Exception as error:  # each family checks its configuration in its own way
        return Row(family.name, "", "", "not built", "not run", _first_line(error))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the row says what the warnings say
        compiled = compile_model(model)
        same = comparison(model, compiled)
    found = regions(compiled)
    words = [describe(g) for g in dict.fromkeys(map(_graph, found)) if g is not None]
    return Row(
        family.name,
        _joined([w.router for w in words]),
        _joined([w.experts for w in words]),
        _joined([r.status for r in found]) or "no MoE block found",
        same,
        _joined([_place_free(r.reason, found) for r in found]) if found else _NOTHING,
    )


def tiny_model(family: Family) -> nn.Module:
    """The tiny model with random weights, the same every time, its own loop over experts on."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = build(family)
    fill(model)
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._experts_implementation = "eager"
    return cast(nn.Module, model)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"


def _graph(region: Region) -> Any:
    for one in (region, region.inner):
        if one is not None and one.first is not None and one.first.graph is not None:
            return one.first.graph
    return None


def _joined(texts: list[str]) -> str:
    return "; ".join(dict.fromkeys(t for t in texts if t))


def _place_free(reason: str, found: Sequence[Region]) -> str:
    """A reason without the path of one region and the names of traced code, which change."""
    for region in found:
        reason = re.sub(rf"(?<![\w.]){re.escape(region.name)}(?![\w.])", "...", reason)
    return re.sub(r"<eval_with_key>\.\d+:\d+", "traced code", reason)


def comparison(model: nn.Module, compiled: nn.Module) -> str:
    """ "yes", or what differs between a model and its compiled form: output or gradients."""
    inputs = inputs_for(model)
    try:
        expected, wanted = _run(model, inputs)
        actual, got = _run(compiled, inputs)
    except MoecError:
        raise
    except Exception as error:  # a family's own code may refuse the inputs made here
        return f"not run: {_first_line(error)}"
    if not _error(actual, expected, expected) <= TOLERANCE:
        return f"no: output differs by {_error(actual, expected, expected):.1e}"
    largest = max(wanted.values(), key=lambda g: float(g.abs().max()))
    for name, gradient in wanted.items():
        if name not in got or not _error(got[name], gradient, largest) <= GRADIENT_TOLERANCE:
            return f"no: the gradient of {name} differs"
    return "yes"


def _run(model: nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The output and every gradient of a loss that weighs its elements differently."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    output = first_tensor(model(**copy.copy(inputs)))
    weights = torch.linspace(-1, 1, output.numel()).reshape(output.shape)
    (output * weights).sum().backward()  # type: ignore[no-untyped-call]
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return output.detach(), gradients


def _error(actual: torch.Tensor, expected: torch.Tensor, scale: torch.Tensor) -> float:
    difference = (actual.double() - expected.double()).abs().max()
    return float(difference / scale.double().abs().max().clamp_min(1e-30))
