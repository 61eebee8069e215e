"""What was compiled for a model: every graph of every region, after every pass."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from moec.api import regions
from moec.manager import Step
from moec.runtime.artifact import Artifact


@dataclass(frozen=True)
class Compilation:
    """One compiled graph: the regions that it serves, its mode and target, and its passes in order.

    ``steps`` has the graphs ``before`` and ``after`` each pass, its ``call``, ``seconds`` and
    ``rewrites``; ``changed`` says whether it did anything.
    """

    regions: tuple[str, ...]
    mode: str
    target: str
    steps: tuple[Step, ...]

    def __str__(self) -> str:
        lines = [f"{', '.join(self.regions)}  {self.mode}, {self.target}"]
        width = max((len(str(s.call)) for s in self.steps if s.changed), default=0)
        for step in self.steps:
            if step.changed:
                sizes = f"{len(step.before.ops)} -> {len(step.after.ops)} ops"
                lines.append(f"  {str(step.call).ljust(width)}  {sizes}")
        return "\n".join(lines)


def history(compiled: nn.Module) -> list[Compilation]:
    """The compilations of a model so far, in the order of its regions.

    Equal blocks share one. Graphs hold neither weights nor values of inputs, and those of one
    compilation share most of their ops, so they are kept as long as the model is.
    """
    served: dict[int, tuple[Artifact, list[str]]] = {}
    for region in regions(compiled):
        for artifact in region.artifacts:
            few = None if artifact.few is None else artifact.few.made
            for one in (artifact, few):
                if one is not None:
                    served.setdefault(id(one), (one, []))[1].append(region.name)
    return [Compilation(tuple(n), a.mode, a.target, a.history) for a, n in served.values()]


__all__ = ["Compilation", "history"]
