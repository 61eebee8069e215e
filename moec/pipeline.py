"""The pipeline, in order, on one page."""

from __future__ import annotations

# what the model means
RAISE = (
    "simplify, cse, dce, dispatch-dense, dispatch-picks, raise-router, raise-limit, "
    "split-low-rank, simplify, cse, dce"
)
# without the router and its gradients in another form: where eager's own rounding counts
CLEAN = "simplify, cse, dce, split-low-rank, simplify, cse, dce"
GRAD = "grad, simplify, cse, dce, adjoint, simplify, cse, dce"  # training only: one joint graph
GRAD_EXACT = "grad{exact=true}, simplify, cse, dce"
KEEP = "recompute, dce"  # what lives between forward and backward
# every product of tokens in kernels whose order of additions is one
INVARIANT = "batch-invariant"
# fewer, larger kernels
FUSE = "fuse-routing, fuse-gemm, fuse-outer, fuse-combine, fuse-tokens, fuse-pointwise, dce"


def pipeline(
    target: str,
    training: bool,
    descriptors: bool = False,
    exact: bool = False,
    gluon: bool = False,
    repro: bool = False,
    token_rounding: int = 0,
    tuning: str = "",
) -> str:
    """The passes for a target ("triton" or "aten"), joined by commas.

    The ``aten`` target calls library products, so it needs no kernels: only work on the same rows
    is fused, to run block by block in the cache. ``descriptors``: the GPU has a copy engine for
    tiles. ``gluon``: it is a Hopper GPU, and Triton's Gluon can be used. ``exact``: operations stay
    the module's own, and their gradients round as autograd's; the experts' outputs are kept for
    them. ``repro``: a token's bits must not depend on the other tokens, for "triton" alone.
    ``token_rounding``: for training, experts get multiples of so many tokens (0: what they get).
    ``tuning``: the file of measured tiles, which ``repro`` does not use.
    """
    stages = [CLEAN if exact else RAISE]
    if training:
        if token_rounding:
            stages.append(f"round-tokens{{tile={token_rounding}}}")
        stages += [GRAD_EXACT if exact else GRAD, KEEP]
    if target == "aten":
        stages.append("fuse-rows, dce")
    else:
        allowed = f"descriptors={str(descriptors).lower()}" + (",gluon=true" if gluon else "")
        if repro:
            stages.append(INVARIANT)
            allowed += ",repro=true"
        elif tuning:
            allowed += f",tuning={tuning}"
        stages += [FUSE, f"lower{{{allowed}}}"]
    return ", ".join(stages)
