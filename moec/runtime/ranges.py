"""Ranges in a profiler's trace: ``moec: model.layers.3.mlp`` and, in it, one for each kernel.

They cost time, so the functions that a model calls have none. Once a profiler runs, a second
module of the same graph serves its calls: its host lines stand in ranges, its kernels are those of
the first. The ranges are those of ``torch.profiler.record_function``: PyTorch's profilers show
them, and NVTX has them under ``torch.autograd.profiler.emit_nvtx``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from torch.autograd import profiler

from moec import cache
from moec.codegen.module import emit_module
from moec.ir.graph import Graph


def is_profiled() -> bool:
    """Whether a profiler of PyTorch runs."""
    return profiler._is_profiler_enabled


def of(region: str, what: str) -> Any:
    """A context whose time a profiler shows under the name of a region and of what it does."""
    return profiler.record_function(f"moec: {region} {what}")


def with_ranges(graph: Graph, target: str, path: Path) -> ModuleType:
    """The functions of an emitted module once more, with a range around each op's lines.

    They take the name of the region first.
    """
    source = emit_module(graph, target, ranges=True)
    module = cache.load(cache.store(source, f"{path.stem}_ranges", path.parent), source)
    first = cache.load(path, cache.source_of(path))
    kernels = {k: v for k, v in vars(first).items() if k not in vars(module)}
    vars(module).update(kernels)
    return module


def in_range(
    region: str, phase: str, plain: Callable[..., Any], inner: Callable[..., Any] | None
) -> Callable[..., Any]:
    """A function that runs ``inner`` on a region's name, or ``plain``, in the range of a region."""
    run = plain if inner is None else functools.partial(inner, region)

    def ranged(*arguments: Any) -> Any:
        with of(region, phase):
            return run(*arguments)

    return ranged


__all__ = ["in_range", "is_profiled", "of", "with_ranges"]
