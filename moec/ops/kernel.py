"""The ``kern.`` dialect: one launchable unit each, whose meaning is its ``body`` in the other two
dialects.

The kind names the anchor that code generation uses; tile sizes are attributes set when lowering.
"""

from __future__ import annotations

from typing import Any

import torch

from moec.errors import IRError
from moec.ir.graph import Graph
from moec.ir.opdef import defop
from moec.ir.types import Type

ANCHORS = {
    "routing": "Scores, selection, weights, histogram, offsets and permutation of all tokens.",
    "grouped_gemm": "A product over ragged rows, a gather before it and pointwise work after it.",
    "grouped_outer": "Weight gradients: a product over ragged rows as the inner dimension, "
    "with gathers on either side.",
    "combine": "The ordered sum of each token's rows, with pointwise work around it.",
    "pointwise": "Pointwise work and row reductions on one set of rows.",
}


def _kernel(name: str, doc: str) -> None:
    def infer(
        *operands: Type,
        body: Graph,
        template: str | None = None,
        tile: tuple[int, ...] | None = None,
        numerics: str | None = None,
    ) -> tuple[Type, ...]:
        expected = tuple(v.type for v in body.inputs)
        if operands != expected:
            raise IRError(
                f"the body takes {', '.join(map(str, expected))}, "
                f"got {', '.join(map(str, operands))}"
            )
        return tuple(v.type for v in body.outputs)

    def evaluate(*operands: torch.Tensor, **attrs: Any) -> torch.Tensor:
        raise IRError(f"kern.{name} is evaluated through its body")

    defop(f"kern.{name}", has_body=True)(
        type(name, (), {"__doc__": doc, "infer": infer, "eval": evaluate})
    )


for _name, _doc in ANCHORS.items():
    _kernel(_name, _doc)
