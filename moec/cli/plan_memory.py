"""``moec plan MODEL``: what the blocks of a model hold in memory, for every number of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import typer
from torch import nn

from moec.byte_sizes import parse_bytes
from moec.capture.shrink import census, signature
from moec.cli.console import read_graphs, say, working
from moec.cli.dims import within
from moec.cli.models import distinct
from moec.declared import Dynamic
from moec.errors import CaptureError, DimError, PlanError
from moec.ir import Graph
from moec.ir.graph import walk
from moec.ir.types import DTYPES, FLOATS
from moec.manager import PassManager
from moec.pipeline import pipeline
from moec.targets import has_descriptors

if TYPE_CHECKING:
    from moec.memory import Prediction

# Numbers of tokens that are shown where none is given.
TOKENS = (1, 128, 4096, 65536)


@dataclass(frozen=True)
class Question:
    """What is asked: for which target and passes, at which sizes, within how many bytes;
    ``dynamic`` is what is declared of a model's inputs.
    """

    target: str
    training: bool
    passes: str | None
    sizes: Mapping[str, int]
    tokens: Sequence[int]
    budget: int | None
    dynamic: Dynamic = field(default_factory=dict)


def budget_of(text: str | None) -> int | None:
    """The bytes of ``--fits``."""
    try:
        return None if text is None else parse_bytes(text)
    except PlanError as error:
        raise typer.BadParameter(f"--fits: {error}") from error


def dtype_of(text: str | None) -> torch.dtype | None:
    """The dtype of ``--dtype``."""
    if text is None:
        return None
    if text not in FLOATS:
        raise typer.BadParameter(f"--dtype {text!r}: use one of {', '.join(FLOATS)}")
    return DTYPES[text]


def plan_memory(subject: str, dtype: str | None, asked: Question) -> None:
    """Print the memory of the graphs of a file, or of a model's blocks and of the model."""
    wanted = dtype_of(dtype)
    if subject == "-" or subject.endswith(".moe"):
        if wanted is not None:
            raise typer.BadParameter("--dtype is for models; the graphs of a file have theirs")
        if asked.dynamic:
            raise typer.BadParameter("--dim is for models; the graphs of a file have their ranges")
        graphs = read_graphs(Path(subject))
        texts = [_text(f"@{g.name}", *_predicted(g, asked), asked) for g in graphs]
    else:
        texts = _of_model(subject, wanted, asked)
    typer.echo("\n\n".join(texts))


def _predicted(graph: Graph, asked: Question) -> tuple[Prediction, Prediction]:
    """The memory of a graph with the worst routing and with balanced routing; after the passes,
    unless it is the result of some.
    """
    from moec.memory import predict

    is_made = bool(graph.cotangents) or any(op.kind.startswith("kern.") for op in walk(graph))
    passes = asked.passes if asked.passes is not None else _passes(asked)
    made = graph if is_made and asked.passes is None else PassManager(passes).run(graph)
    worst, balanced = (predict(made, asked.target, balanced=even) for even in (False, True))
    return worst.where(asked.sizes), balanced.where(asked.sizes)


def _text(head: str, worst: Prediction, balanced: Prediction, asked: Question) -> str:
    from moec.memory.text import prediction_text

    try:
        return f"{head}\n{prediction_text(worst, balanced, asked.tokens, asked.budget)}"
    except DimError as error:  # the other blocks may have one dim
        return f"{head}\n{error}"


def _passes(asked: Question) -> str:
    """The default pipeline, for the GPU of this machine, or one with a copy engine for tiles."""
    there = torch.cuda.is_available()
    descriptors = has_descriptors(torch.device("cuda")) if there else True
    return pipeline(asked.target, asked.training, descriptors)


def _of_model(spec: str, dtype: torch.dtype | None, asked: Question) -> list[str]:
    from moec.capture.model_spec import load
    from moec.capture.regions import find_regions

    with working(f"building {spec}"):
        loaded = load(spec, dtype)
    if loaded.note:
        say(f"{spec}: {loaded.note}")
    with working("looking for regions"):
        found = within(loaded.model, asked.dynamic, find_regions(loaded.model))
    groups = distinct(found)
    if not groups:
        raise CaptureError(f"{spec} has no MoE block that could be captured; moec explain says why")
    whole = loaded.model if loaded.whole is None else loaded.whole
    texts, counted = [], []
    for graph, names in groups:
        count = _count([r.module for r in found if r.name in names], loaded.whole)
        others = f" and {count - 1} equal" if count > 1 else ""
        worst, balanced = _predicted(graph, asked)
        texts.append(_text(f"@{graph.name}: {names[0]}{others}", worst, balanced, asked))
        counted.append((worst, count))
    return [*texts, _whole(whole, counted, asked)]


def _count(modules: Sequence[nn.Module], whole: nn.Module | None) -> int:
    """How many such blocks a model has; ``whole`` is the one that a smaller one stands for."""
    if whole is None:
        return len(modules)
    return census(whole, {type(modules[0])}).counts.get(signature(modules[0]), len(modules))


def _whole(model: nn.Module, counted: Sequence[tuple[Prediction, int]], asked: Question) -> str:
    from moec.memory.model import ModelMemory, Part, bytes_of_parameters
    from moec.memory.text import model_text

    parts = tuple(Part(prediction, count) for prediction, count in counted)
    memory = ModelMemory(bytes_of_parameters(model), parts)
    try:
        return model_text(memory, asked.tokens, asked.budget)
    except DimError as error:
        return f"the model is not counted: {error}"


__all__ = ["TOKENS", "Question", "budget_of", "dtype_of", "plan_memory"]
