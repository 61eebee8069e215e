"""``experts_implementation="moec"`` for Hugging Face transformers.

Importing this module registers the name in transformers' experts interface. Models then keep
everything of their own but the loop over experts: each experts module asks a region, which reads
the module's own code (not its name or its flags), checks it, and compiles it once for every number
of tokens. :func:`moec.compile` goes further: it compiles whole blocks.
"""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moec.capture.regions import Candidate, FoundRegion
from moec.mode import Mode
from moec.region import Region
from moec.session import Session
from moec.surroundings import is_traced
from moec.traced import run_experts

NAME = "moec"
_HOLDER = "_moec_interface"
# Modules with one configuration share captures; a session lives as long as one of its regions.
_SESSIONS: weakref.WeakValueDictionary[int, Session] = weakref.WeakValueDictionary()


def experts_forward(
    experts: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Serve a call of an experts module: tokens ``[T, H]``, indices and weights ``[T, K]``.

    What moec cannot read runs the module's own loop, after one warning with the reason.
    """
    data = (hidden_states, top_k_index, top_k_weights)
    if torch.compiler.is_compiling() or is_traced():
        result: Any = run_experts(experts, _number(experts), data)
    else:
        result = _region(experts).call(experts, data, {})
    if result is NotImplemented:
        result = own_forward(type(experts))(experts, *data)
    return result  # type: ignore[no-any-return]


def own_forward(cls: type[nn.Module]) -> Any:
    """The forward that an experts class was written with, before transformers wrapped it."""
    return inspect.unwrap(cls.forward)


@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
def _number(experts: nn.Module) -> str:
    return _region(experts).number


def _region(experts: nn.Module) -> Region:
    holder = vars(experts).get(_HOLDER)
    if holder is None:
        holder = _Holder(_InterfaceRegion(_session(experts), experts))
        vars(experts)[_HOLDER] = holder
    return holder.region


def _session(experts: nn.Module) -> Session:
    key = id(getattr(experts, "config", experts))
    return _SESSIONS.setdefault(key, Session())


class _Holder:
    """Keeps the region of one module; copies and pickles of the module start without one."""

    def __init__(self, region: Region) -> None:
        self.region = region

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


class _InterfaceRegion(Region):
    """A region whose module has its own class and asks through transformers' interface."""

    def __init__(self, session: Session, experts: nn.Module) -> None:
        super().__init__(session, Candidate(type(experts).__name__, experts, None), "experts")

    def _read(self, mode: Mode, values: Mapping[str, torch.Tensor]) -> FoundRegion:
        with _own_code(self.candidate.module):
            return super()._read(mode, values)


@contextlib.contextmanager
def _own_code(experts: nn.Module) -> Iterator[None]:
    """Within the context the module runs its own loop, with which captures are compared."""
    vars(experts)["forward"] = own_forward(type(experts)).__get__(experts)
    try:
        yield
    finally:
        del vars(experts)["forward"]


ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)

__all__ = ["NAME", "experts_forward"]
