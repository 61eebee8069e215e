"""The form of a module's result: which leaves are tensors of the graph, which are constants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree


@dataclass(frozen=True)
class ResultForm:
    """A module's result: its structure and the leaves that are no tensors, by place.

    ``axes`` has for each tensor the number of axes that come after the tokens' leading axes;
    ``None`` for a tensor that is as computed.
    """

    tree: Any = None
    constants: tuple[tuple[int, Any], ...] = ()
    axes: tuple[int | None, ...] = (None,)

    def build(self, outputs: Sequence[torch.Tensor], lead: Sequence[int]) -> Any:
        """The result, from a graph's outputs and the sizes of the tokens' leading axes."""
        leaves: list[Any] = [
            o if n is None else o.reshape(*lead, *o.shape[o.dim() - n :])
            for o, n in zip(outputs, self.axes, strict=True)
        ]
        return self.assemble(leaves)

    def assemble(self, tensors: Sequence[torch.Tensor]) -> Any:
        """The result, from tensors that have their sizes already."""
        if self.tree is None:
            return tensors[0]
        leaves: list[Any] = list(tensors)
        for place, value in self.constants:
            leaves.insert(place, value)
        return _pytree.tree_unflatten(leaves, self.tree)


ONE_TENSOR = ResultForm()

__all__ = ["ONE_TENSOR", "ResultForm"]
