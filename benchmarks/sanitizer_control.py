# mypy: ignore-errors
"""A kernel in which two groups of warps are sent to their functions, and do nothing to speak of."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def put(out, PLACE: gl.constexpr):
    """Store a number."""
    gl.store(out + PLACE, PLACE + 1)


@gluon.jit
def dispatch(out):
    """Two groups, each with a number to store."""
    gl.warp_specialize([(put, (out, 0)), (put, (out, 1))], [4], [24])
