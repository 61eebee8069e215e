"""Running a block with a loop under a recorder, each expert one opaque call."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils._python_dispatch import _disable_current_modes

from moec.capture.experts import integer_buffers, named_weights
from moec.capture.recorder import Recorder
from moec.capture.requirements import raised_at
from moec.capture.traced_sizes import SizeTrace
from moec.errors import CaptureError, NotRunError


@dataclass(frozen=True)
class Run:
    """One recording of the block: its trace, its result, and the values of its nodes."""

    recorder: Recorder
    out: Any
    tokens: int
    trace: SizeTrace | None = None

    def nodes(self, floating: bool, width: int | None = None) -> Iterator[fx.Node]:
        """Recorded values with one row a token: ``[.., width]``."""
        for node in self.recorder.graph.nodes:
            value = node.meta.get("val")
            if (
                not isinstance(value, torch.Tensor)
                or value.is_floating_point() != floating
                or value.dtype == torch.bool
            ):
                continue
            columns = value.shape[-1] if value.dim() > 1 else 1
            if (
                value.numel() == self.tokens * columns
                and value.dim() >= 1
                and width in (None, columns)
            ):
                yield node


def run_block(
    module: nn.Module,
    name: str | None,
    members: Sequence[nn.Module],
    hidden: int,
    dtype: torch.dtype | None,
    leading: tuple[int, ...],
    trace: SizeTrace | None,
) -> Run:
    parameter = next(module.parameters())
    generator = torch.Generator().manual_seed(sum(leading))
    x = torch.randn(*leading, hidden, generator=generator).to(
        parameter.device, dtype or parameter.dtype
    )
    recorder = Recorder(creations=True)
    recorder.mark("x", x)
    for weight, tensor in (*named_weights(module), *integer_buffers(module)):
        if name is None or not weight.startswith(f"{name}."):
            recorder.mark(weight, tensor)
    state = torch.get_rng_state()
    try:
        seen = _opaque_members(members, recorder)
        with torch.no_grad(), seen, recorder, recorder.watching(), trace or nullcontext():
            out = module(x)
    except CaptureError:
        raise
    except (
        Exception
    ) as error:  # the user's code may raise anything on inputs that it was not written for
        raise NotRunError(
            f"{type(module).__name__} did not run on tokens of shape {tuple(x.shape)}: "
            f"{raised_at(error)}"
        ) from error
    finally:
        torch.set_rng_state(state)
    return Run(recorder, out, x[..., 0].numel(), trace)


def expert_call(x: torch.Tensor, expert: int) -> torch.Tensor:
    """Stands for a call of an expert in a recording; never run."""
    raise NotImplementedError


@contextlib.contextmanager
def _opaque_members(members: Sequence[nn.Module], recorder: Recorder) -> Iterator[None]:
    """Within the context each expert is one recorded call."""

    def replacement(number: int, expert: nn.Module) -> Any:
        def forward(rows: torch.Tensor) -> torch.Tensor:
            with _disable_current_modes(), torch.no_grad():
                out = type(expert).forward(expert, rows)
            out = out.clone() if out is rows else out  # an expert may give the token itself
            return recorder.opaque(expert_call, (rows, number), out)

        return forward

    for number, expert in enumerate(members):
        expert.__dict__["forward"] = replacement(number, expert)
    try:
        yield
    finally:
        for expert in members:
            del expert.__dict__["forward"]


__all__ = ["Run", "expert_call", "run_block"]
