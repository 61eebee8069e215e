"""The pipeline, in order, on one page."""

from __future__ import annotations

RAISE = "simplify, cse, dce, raise-router, simplify, dce"  # what the model means
GRAD = "grad, simplify, cse, dce, adjoint, simplify, cse, dce"  # training only: one joint graph
KEEP = "recompute, dce"  # what lives between forward and backward
# fewer, larger kernels
FUSE = "fuse-routing, fuse-gemm, fuse-outer, fuse-combine, fuse-pointwise, dce"


def pipeline(target: str, training: bool) -> str:
    """The passes for a target ("triton" or "aten"), joined by commas.

    The ``aten`` target calls library products, so it needs no kernels: it stops before fusion.
    """
    stages = [RAISE]
    if training:
        stages += [GRAD, KEEP]
    if target != "aten":
        stages.append(FUSE)
    return ", ".join(stages)
