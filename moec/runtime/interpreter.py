"""Corrections of Triton's interpreter for bfloat16, which it holds as integers.

It multiplies those integers in ``tl.dot``, and rounds towards zero when it converts to bfloat16;
GPUs multiply the values and round to nearest. For ``TRITON_INTERPRET=1`` only.
"""

from __future__ import annotations

import os
from typing import Any


def correct_bfloat16() -> None:
    """Let the interpreter of this process compute with bfloat16 as a GPU does."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    from triton.runtime.interpreter import InterpreterBuilder

    plain_dot, plain_cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl
    if getattr(plain_dot, "knows_bfloat16", False):
        return

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return plain_dot(self, _widened(a), _widened(b), *rest)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        import triton.language as tl

        source = _widened(source)
        if target.scalar == tl.bfloat16 and source.dtype.scalar.is_floating():
            return _rounded(source)
        return plain_cast(self, source, target)

    create_dot.knows_bfloat16 = True  # type: ignore[attr-defined]
    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = create_dot, cast_impl


def _widened(handle: Any) -> Any:
    """bfloat16 as float32; anything else as it is."""
    import numpy
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return TensorHandle((handle.data.astype(numpy.uint32) << 16).view(numpy.float32), tl.float32)


def _rounded(handle: Any) -> Any:
    """The nearest bfloat16, the even one of two."""
    import numpy
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    bits = numpy.ascontiguousarray(handle.data, numpy.float32).view(numpy.uint32)
    nearest = (bits.astype(numpy.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet = numpy.where(numpy.isnan(handle.data), 0x7FC0, nearest)
    return TensorHandle(quiet.astype(numpy.uint16).reshape(handle.data.shape), tl.bfloat16)
