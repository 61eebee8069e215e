"""Blocks that users write: a loop over a list of experts, with the routing in the block itself."""

from __future__ import annotations

import torch
from torch import nn

from moec.capture.block import CapturedBlock
from moec.errors import CaptureError


def has_expert_list(module: nn.Module) -> bool:
    """Whether a module holds a list of at least two experts of one structure."""
    return False


def capture_loop(module: nn.Module, path: str, dtype: torch.dtype | None, rank: int) -> CapturedBlock:
    raise CaptureError("loops are not captured")
