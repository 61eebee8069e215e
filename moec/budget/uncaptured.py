"""Why a step is no single graph: which part of the model, its line, what can be planned instead."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import CodeType

import torch
from torch import nn

import moec
from moec.errors import CompileError
from moec.model_scope import first_line

_OWN = tuple(str(Path(p).parent) for p in (torch.__file__, moec.__file__) if p)


def uncaptured(model: nn.Module, name: str, error: Exception) -> CompileError:
    """What to tell a user whose model the tracer could not capture whole."""
    frames = _model_frames(error)
    path = _module_at(model, frames)
    return CompileError(
        f"{name} cannot be planned as a whole: its step is no single graph. The tracer stopped"
        f"{_place(model, path, frames)}: {first_line(error)}\n"
        f"Leave memory_budget out, or plan by parts: {_offer(model, path)}"
    )


def _model_frames(error: Exception) -> list[traceback.FrameSummary]:
    """The lines that the tracer was at, the outermost first, without PyTorch's and our own."""
    stack: Sequence[traceback.FrameSummary] = getattr(error, "real_stack", None) or ()
    return [frame for frame in stack if not frame.filename.startswith(_OWN)]


def _place(model: nn.Module, path: str, frames: Sequence[traceback.FrameSummary]) -> str:
    if not frames:
        return ""
    kind = _class_of(model.get_submodule(path)).__name__
    where = f" in {path} ({kind})" if path else f" in {kind}"
    frame = frames[-1]
    return f"{where} at {Path(frame.filename).name}:{frame.lineno} `{(frame.line or '').strip()}`"


def _class_of(module: nn.Module) -> type[nn.Module]:
    """The class that somebody wrote."""
    found: type[nn.Module] = getattr(type(module), "_moec_original", type(module))
    return found


def _module_at(model: nn.Module, frames: Sequence[traceback.FrameSummary]) -> str:
    """The path of the innermost module whose ``forward`` the tracer was in; of several of one
    class, of the first.
    """
    for frame in reversed(frames):
        for path, module in model.named_modules():
            if _is_inside(frame, module):
                return str(path)
    return ""


def _is_inside(frame: traceback.FrameSummary, module: nn.Module) -> bool:
    code = getattr(inspect.unwrap(_class_of(module).forward), "__code__", None)
    if not isinstance(code, CodeType) or code.co_filename != frame.filename:
        return False
    lines = [line for _, _, line in code.co_lines() if line is not None]
    return min(lines) <= (frame.lineno or 0) <= max(lines)


def _offer(model: nn.Module, path: str) -> str:
    """How to plan by parts, with the largest part of the model that the tracer may get through."""
    part = max(_parts_beside(model, path), key=lambda p: _elements(model, p), default="PART")
    return (
        "give each part that is one graph a budget of its own, as model.set_submodule"
        f"('{part}', moec.compile(model.get_submodule('{part}'), memory_budget=...))"
    )


def _parts_beside(model: nn.Module, path: str) -> Iterator[str]:
    """Parts, with parts of their own, that have nothing of the class of the one at ``path``;
    compiled blocks are left out: alone they have no budget.
    """
    kind = type(model.get_submodule(path))
    for name, module in model.named_modules():
        inside = any(type(m) is kind for m in module.modules())
        if name and not inside and any(module.children()) and not _is_list(module):
            if not hasattr(type(module), "_moec_original"):
                yield name


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList | nn.ModuleDict)


def _elements(model: nn.Module, path: str) -> int:
    return sum(p.numel() for p in model.get_submodule(path).parameters())


__all__ = ["uncaptured"]
