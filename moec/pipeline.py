"""The pipeline, in order, on one page."""

from __future__ import annotations

# what the model means
RAISE = "simplify, cse, dce, dispatch-dense, raise-router, split-low-rank, simplify, cse, dce"
# without the router: float64 models whose routers work in float32
CLEAN = "simplify, cse, dce, split-low-rank, simplify, cse, dce"
GRAD = "grad, simplify, cse, dce, adjoint, simplify, cse, dce"  # training only: one joint graph
KEEP = "recompute, dce"  # what lives between forward and backward
# fewer, larger kernels
FUSE = "fuse-routing, fuse-gemm, fuse-outer, fuse-combine, fuse-pointwise, dce"


def pipeline(target: str, training: bool, descriptors: bool = False, exact: bool = False) -> str:
    """The passes for a target ("triton" or "aten"), joined by commas.

    The ``aten`` target calls library products, so it needs no kernels: only work on the same rows
    is fused, to run block by block in the cache. ``descriptors``: the GPU has a copy engine for
    tiles. ``exact``: the router's operations stay the module's own, and their gradients round as
    autograd's.
    """
    stages = [CLEAN if exact else RAISE]
    if training:
        stages += [GRAD.replace("grad", "grad{exact=true}", 1) if exact else GRAD, KEEP]
    if target == "aten":
        stages.append("fuse-rows, dce")
    else:
        stages += [FUSE, f"lower{{descriptors={str(descriptors).lower()}}}"]
    return ", ".join(stages)
