"""Launching compiled kernels with little work on the host.

Triton's own launch binds, specialises and hashes every argument. An emitted kernel has few forms,
so the compiled one is remembered under the few facts that Triton specialises on, and launched
directly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from moec.runtime.recording import current
from moec.trace_events import span


class Kernel:
    """A ``triton.jit`` function whose launches are remembered; used in its place:
    ``kernel[grid](...)``.

    Arguments that vary are positional and come first; constants are keywords or defaults.
    """

    def __init__(self, function: Any) -> None:
        self.function = function
        self.__doc__ = function.__doc__
        self._compiled: dict[Any, tuple[Any, tuple[Any, ...]] | None] = {}
        self._remembers = hasattr(function, "device_caches") and torch.cuda.is_available()

    def __getitem__(self, grid: Sequence[int]) -> Callable[..., None]:
        if not self._remembers:
            launch: Callable[..., None] = self.function[tuple(grid)]
            recording = current()
            if recording is not None:
                return lambda *args, **options: recording.interpreted(launch, args, options)
            return launch
        return lambda *arguments, **options: self._launch(grid, arguments, options)

    def _launch(
        self, grid: Sequence[int], arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        key = (
            tuple(map(_specialisation, arguments)),
            *options.items(),
            torch.cuda.current_device(),
        )
        known = self._compiled.get(key)
        if known is None:
            self._first(grid, arguments, options, key)
            known = self._compiled.get(key)
        else:
            compiled, constants = known
            compiled[(*grid, 1, 1)[:3]](*arguments, *constants)
        recording = current()
        if recording is not None and known is not None:
            compiled, constants = known
            recording.launch(compiled, grid, (*arguments, *constants))

    def _first(
        self, grid: Sequence[int], arguments: tuple[Any, ...], options: dict[str, Any], key: Any
    ) -> None:
        """Launch through Triton, which compiles, and remember what it compiled."""
        with span(self.function.__name__, "kernel compile"):
            compiled = self.function[tuple(grid)](*arguments, **options)
        parameters = list(self.function.signature.parameters.values())[len(arguments) :]
        if compiled is not None:
            constants = tuple(options.get(p.name, p.default) for p in parameters)
            self._compiled[key] = compiled, constants


def _specialisation(argument: Any) -> Any:
    """What Triton's code may depend on: alignment of addresses, and whether a number is 1 or a
    multiple of 16.
    """
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, int):
        return argument % 16 == 0, argument == 1
    return None
