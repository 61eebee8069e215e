"""Triton's interpreter holds bfloat16 as integers and multiplies them as such: correct ``tl.dot``."""

from __future__ import annotations

import os
from typing import Any


def correct_products() -> None:
    """Let products of bfloat16 tiles be taken of their values; for ``TRITON_INTERPRET=1`` only."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    from triton.runtime.interpreter import InterpreterBuilder

    plain = InterpreterBuilder.create_dot
    if getattr(plain, "takes_bfloat16", False):
        return

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return plain(self, _values(a), _values(b), *rest)

    create_dot.takes_bfloat16 = True  # type: ignore[attr-defined]
    InterpreterBuilder.create_dot = create_dot


def _values(handle: Any) -> Any:
    import numpy
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return TensorHandle((handle.data.astype(numpy.uint32) << 16).view(numpy.float32), tl.float32)
