"""The passes, one a file; importing this package registers them all."""

from moec.passes import (
    adjoint,
    cse,
    dce,
    dispatch_dense,
    fuse_combine,
    fuse_gemm,
    fuse_outer,
    fuse_pointwise,
    fuse_routing,
    fuse_rows,
    grad,
    lower,
    raise_router,
    recompute,
    simplify,
    split_low_rank,
)

__all__ = [
    "adjoint",
    "cse",
    "dce",
    "dispatch_dense",
    "fuse_combine",
    "fuse_gemm",
    "fuse_outer",
    "fuse_pointwise",
    "fuse_routing",
    "fuse_rows",
    "grad",
    "lower",
    "raise_router",
    "recompute",
    "simplify",
    "split_low_rank",
]
