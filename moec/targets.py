"""Which target serves a device."""

from __future__ import annotations

import importlib.metadata
import importlib.util

import torch

from moec.errors import CompileError

TARGETS = ("triton", "aten")


def choose_target(asked: str | None, device: torch.device) -> str:
    """``asked``, or "triton" on a GPU that Triton supports and "aten" elsewhere.

    Raises :class:`CompileError` for an unknown name.
    """
    if asked is not None and asked not in TARGETS:
        raise CompileError(f"unknown target {asked!r}; targets: {', '.join(TARGETS)}")
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return "aten"
    if asked is not None:
        return asked
    capability = torch.cuda.get_device_capability(device)
    return "triton" if capability >= (8, 0) else "aten"


def has_descriptors(device: torch.device) -> bool:
    """Whether a GPU has a copy engine that Triton's tensor descriptors use (Hopper and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


# versions of Triton under which the kernels in Gluon were run; others use the portable templates
_GLUON = ((3, 6),)


def has_gluon(device: torch.device) -> bool:
    """Whether a GPU runs the kernels in Gluon: a Hopper, under a known version of Triton."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return False
    version = importlib.metadata.version("triton").split(".")
    return tuple(int(part) for part in version[:2]) in _GLUON
