"""``python -m moec.tuning.worker``: times graphs, one a line of JSON on stdin, in this process.

A request names a file of IR, sizes and a target; the answer, a line of JSON on stdout, has the
milliseconds of each op in its place in the emitted module, or why there are none: a graph whose
results are not those of the first one on the same inputs is refused. A kernel that hangs or ends
the process ends nothing else; see :mod:`moec.tuning.timing`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from moec.execute import op_times
from moec.files import decoded, read_bounded
from moec.inputs import random_inputs
from moec.ir.graph import Graph
from moec.ir.lexer import MAX_BYTES
from moec.ir.parser import parse_file

TOLERANCE = 0.02  # in norm: tiles round in other orders
_SAMPLE = 1 << 20  # numbers of a result that are compared


class _Inputs:
    """The arguments of the last graph's types and sizes, for as long as they stay the same, and a
    part of the results that its first graph had.
    """

    def __init__(self) -> None:
        self.key: Any = None
        self.tensors: Sequence[torch.Tensor] = ()
        self.expected: list[torch.Tensor] = []

    def of(self, graph: Graph, sizes: dict[str, int]) -> Sequence[torch.Tensor]:
        key = [v.type for v in (*graph.inputs, *graph.cotangents)], sizes
        if key != self.key:
            self.key, self.tensors, self.expected = None, (), []
            device = "cuda" if torch.cuda.is_available() else "cpu"
            if device == "cuda":
                torch.cuda.empty_cache()
            self.tensors = random_inputs(graph, sizes, device=device)
            self.key = key
        return self.tensors

    def compare(self, results: Sequence[torch.Tensor]) -> None:
        """Note the first results, and raise ``ValueError`` if later ones are others."""
        found = [_part(t) for t in results]
        self.expected = self.expected or found
        for place, (one, other) in enumerate(zip(found, self.expected, strict=True)):
            error = float((one - other).norm() / other.norm().clamp_min(1e-30))
            if not error <= TOLERANCE:  # a NaN is refused, too
                raise ValueError(f"result {place} is another than before, by {error:.1e} in norm")


def _part(tensor: torch.Tensor) -> torch.Tensor:
    """Numbers of a tensor at equal distances; odd, so that they are not all of some columns."""
    flat = tensor.detach().reshape(-1)
    return flat[:: flat.numel() // _SAMPLE | 1].double()


def answer(request: dict[str, Any], inputs: _Inputs) -> dict[str, Any]:
    """The times that a request asks for."""
    path = request["graph"]
    try:
        text = decoded(read_bounded(Path(path), MAX_BYTES), path, MAX_BYTES)
        (graph,) = parse_file(text, path)
        arguments = inputs.of(graph, request["sizes"])
        times = op_times(graph, request["target"], arguments, request["rounds"], inputs.compare)
    except Exception as error:  # of emitters, kernel compilers and launches
        first = next(iter(str(error).splitlines()), "")
        return {"failed": f"{type(error).__name__}: {first}"[:300]}
    return {"ms": [times.get(op, 0.0) for op in graph.ops]}


def main() -> None:
    """Answer until stdin ends."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what compilers print goes to stderr
    inputs = _Inputs()
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line), inputs)), file=out, flush=True)


if __name__ == "__main__":
    main()
