"""What a forward leaves behind on its modules: plain values that are the same for every call.

A compiled call sets them as the module's own code would. Values that follow from the tokens or from
their number are refused: a compiled call does not compute them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moec.errors import CaptureError

PLAIN = (int, float, str, bool, type(None), torch.dtype, torch.device)


@dataclass(frozen=True)
class Write:
    """An attribute that a call sets: the module's path, the name and the value."""

    owner: str
    name: str
    value: Any

    @property
    def is_plain(self) -> bool:
        """Whether the value holds no tensor and nothing else that can change."""
        return isinstance(self.value, PLAIN)

    def __str__(self) -> str:
        return f"{self.owner}.{self.name}".lstrip(".")


def refuse_writes(writes: Sequence[Write]) -> None:
    """Raise :class:`CaptureError` that names what was set, if anything was."""
    if writes:
        raise CaptureError(
            f"forward changes {', '.join(map(str, writes[:3]))} of the module, which a compiled "
            "call would not; return the value instead"
        )


def apply_writes(module: nn.Module, writes: Sequence[Write]) -> None:
    """Set what a call of the module's own code would have set."""
    for write in writes:
        setattr(module.get_submodule(write.owner), write.name, write.value)


__all__ = ["Write", "apply_writes", "refuse_writes"]
