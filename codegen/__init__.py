"""Code generation: a graph becomes one importable Python module."""

from moec.codegen.module import emit_module

__all__ = ["emit_module"]
