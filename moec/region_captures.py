"""The captures of a region, made when a mode is first seen, and kept true to its module."""

from __future__ import annotations

import re
import threading
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from moec.call_form import (
    CallForm,
)
from moec.capture.regions import (
    Candidate,
    FoundRegion,
    capture_experts,
    capture_whole,
    experts_below,
)
from moec.capture.trial import Trial
from moec.compiled import as_original, restore
from moec.declared_check import CheckInputs
from moec.errors import CallError
from moec.guards import Guard
from moec.ir.graph import Graph
from moec.log_captures import log_capture, log_forgotten
from moec.manager import Step
from moec.mode import Mode, capture_autocast, has_hooks, is_empty, types_below
from moec.result_form import ResultForm
from moec.runtime.artifact import Artifact
from moec.session import Session
from moec.share import share
from moec.steady import SteadyCalls
from moec.structure import plain_settings, structure_key
from moec.surroundings import NO_WEIGHTS, isolated, odd_reason, odd_tensor
from moec.targets import choose_target
from moec.trace_events import span

if TYPE_CHECKING:
    from moec.region import Region

# Tracers have state of the whole process: one capture at a time.
_READING = threading.RLock()


class RegionCaptures:
    """The captures of one region, by mode, and what became of it."""

    def __init__(self, session: Session, candidate: Candidate, kind: str) -> None:
        self.session, self.candidate, self.kind = session, candidate, kind
        self.name = candidate.name
        self.found: dict[Mode, FoundRegion] = {}
        self.traced: dict[str, tuple[CallForm, ResultForm]] = {}
        self.artifacts: list[Artifact] = []
        self.inner: Region | None = None
        self.check: CheckInputs | None = None  # of a model that is one region
        self.unserved = ""
        self._types = types_below(candidate.module)
        self._guard = Guard(candidate.module)
        self.settings = plain_settings(candidate.module)
        self._tensors: dict[tuple[str, ...], list[tuple[nn.Module, str]]] = {}
        self.steady: SteadyCalls = {}

    # what a user sees
    @property
    def first(self) -> FoundRegion | None:
        """The first capture that gave a graph; the first one if none did."""
        read = (f for f in self.found.values() if f.graph is not None)
        return next(read, next(iter(self.found.values()), None))

    @property
    def status(self) -> str:
        """What became of the region."""
        served = bool(self.artifacts) or not self.unserved
        if self.first is not None and self.first.graph is not None and served:
            return "compiled"
        inner = (
            self.inner is not None
            and self.inner.first is not None
            and self.inner.first.graph is not None
        )
        return "experts only" if inner else "left as it was"

    @property
    def reason(self) -> str:
        """Why the region is not compiled as a whole; empty if it is."""
        if self.status == "compiled":
            return ""
        if self.first is None and is_empty(self.candidate.module):
            return (
                "its weights are on the meta device; the first call after they are loaded captures"
            )
        return self.unserved or ("" if self.first is None else self.first.reason)

    @property
    def target(self) -> str:
        """The target that serves it."""
        parameter = next(self.candidate.module.parameters(), None)
        return choose_target(
            self.session.target, parameter.device if parameter is not None else torch.device("cpu")
        )

    @property
    def history(self) -> list[tuple[str, Graph]]:
        """The captured graph, then the graph after each pass of the latest artifact that changed
        it.
        """
        artifact = self.artifacts[-1] if self.artifacts else None
        steps: Sequence[Step] = artifact.history if artifact is not None else ()
        start = steps[0].before if steps else (self.first.graph if self.first is not None else None)
        captured = [] if start is None else [("capture", start)]
        return captured + [(str(s.call), s.after) for s in steps if s.changed]

    # capture
    def capture(self, mode: Mode, values: Mapping[str, torch.Tensor] | None = None) -> FoundRegion:
        """The region's IR in a mode; structurally equal modules are captured once a session.

        ``values`` are integers that further tensors of a call may hold, by parameter.
        """
        if mode not in self.found:
            weights = list(self.candidate.module.parameters())
            odd = odd_tensor(weights)
            if odd is not None or not weights:
                return self._left_odd(odd_reason(odd) if odd is not None else NO_WEIGHTS)
            self._refuse_dtype(self._capture(mode, values), mode)
            self._report(self.found[mode])
        return self.found[mode]

    def _left_odd(self, reason: str) -> FoundRegion:
        """Nothing captured, since the weights are of a kind that compiled code cannot take; tried
        again at the next call.
        """
        self.unserved = reason
        module, name = self.candidate.module, self.name or "the model"
        self.session.warn(f"moec: {name} ({type(module).__name__}) runs its own code: {reason}")
        return FoundRegion(self.name, module, self.kind, None, reason=reason)

    def _capture(self, mode: Mode, values: Mapping[str, torch.Tensor] | None = None) -> FoundRegion:
        if mode not in self.found:
            module = self.candidate.module
            key = (structure_key(module), mode, self.kind)
            with log_capture(self, mode, is_known=key in self.session.captures):
                isolated(lambda: self._read_once(key, mode, values or {}), mode.device)
                found = replace(self.session.captures[key], name=self.name, module=module)
                self.found[mode] = found
        return self.found[mode]

    def _read_once(self, key: Hashable, mode: Mode, values: Mapping[str, torch.Tensor]) -> None:
        with _READING:
            if key not in self.session.captures:
                with self.session.watching.recording(), span(self.name, "capture"):
                    self.session.captures[key] = self._read(mode, values)

    def try_capture(self) -> None:
        """Capture in the model's present mode, so that what stays as it was is known at once."""
        module = self.candidate.module
        parameter = next((p for p in module.parameters() if p.is_floating_point()), None)
        if parameter is None or is_empty(module):
            return  # without weights there is nothing to compare: the first call captures
        odd = odd_tensor(module.parameters())
        if odd is not None:  # the call may find others: sharded weights are gathered for it
            self.unserved = odd_reason(odd)
            return
        plain = Mode(module.training, parameter.dtype, 3, None, device=parameter.device)
        if self.candidate.dense is not None and self.candidate.dense.extra:
            self._try_forms(plain)
        elif self.kind == "block":
            self._try_ranks(plain)
        if self.status != "compiled":
            inner = self.inner if self.inner is not None else self
            if is_empty(inner.candidate.module):
                self._tell(self.reason)
            elif inner.kind == "experts":
                inner.capture(replace(plain, rank=2, choices=2, weight_dtype=parameter.dtype))

    def _try_ranks(self, mode: Mode) -> None:
        """Capture for tokens with batch and sequence; for flat ones where that cannot be."""
        if self._capture(mode).graph is None:
            flat = replace(mode, rank=2)
            if self._capture(flat).graph is not None:
                del self.found[
                    mode
                ]  # a call of that form, if one comes, says why it is not compiled
                return
            del self.found[flat]
        self._report(self.found[mode])

    def _try_forms(self, mode: Mode) -> None:
        """Capture for the first form of arguments after the tokens that can be captured."""
        form: Any = self.candidate.dense
        modes = [replace(mode, rank=r, extras=e) for r in (3, 2) for e in form.arguments(r)]
        for one in modes:
            if self._capture(one).graph is not None:
                self.found = {one: self.found[one]}
                return
        self._report(self._capture(modes[0]))

    def _read(self, mode: Mode, values: Mapping[str, torch.Tensor]) -> FoundRegion:
        """Capture a twin of the module: other threads may be calling the module itself."""
        twin = share(self.candidate.module)
        candidate = replace(self.candidate, module=twin)
        with as_original(twin), capture_autocast(mode):
            if self.kind == "experts":
                return capture_experts(
                    candidate, mode.dtype, mode.choices, mode.weight_dtype or torch.float32
                )
            trial = Trial(mode.form, values)
            return capture_whole(candidate, mode.dtype, mode.rank, trial, mode.extras)

    def _refuse_dtype(self, found: FoundRegion, mode: Mode) -> None:
        """Refuse tokens of a dtype with which the module's own code does not run either."""
        own = {p.dtype for p in self.candidate.module.parameters()}
        if found.ran or mode.autocast is not None or mode.dtype in own:
            return
        del self.found[mode]  # so that the next such call is refused too
        weights = " and ".join(sorted(str(d).removeprefix("torch.") for d in own))
        tokens = str(mode.dtype).removeprefix("torch.")
        raise CallError(
            f"{self.name or 'the model'}: the tokens (argument 1) are {tokens}, "
            f"the weights are {weights}; cast one of the two"
        )

    def _report(self, found: FoundRegion) -> None:
        if found.graph is not None or self.inner is not None:
            return  # a block whose experts are a region of their own reports through that one
        self._tell(found.reason)

    def _tell(self, reason: str) -> None:
        """Warn of the reason why the region stays as it was, or raise it in strict mode."""
        kind = type(self.candidate.module).__name__
        self.session.warn(
            f"moec: {self.name or 'the model'} ({kind}) stays as it was: {reason}. "
            "moec.explain(model) lists all regions.",
            kind + re.sub(r"\([\w.]+\)", "", reason).replace(self.name, ""),
        )

    def _forget(self) -> None:
        log_forgotten(self)
        self.found.clear()
        self._tensors.clear()
        self.steady.clear()
        self._guard = Guard(self.candidate.module)

    def _weights(self, found: FoundRegion, module: nn.Module) -> list[torch.Tensor]:
        if found.weights not in self._tensors:
            places = []
            for path in found.weights:
                owner, _, name = path.rpartition(".")
                places.append((module.get_submodule(owner), name))
            self._tensors[found.weights] = places
        return [getattr(owner, name) for owner, name in self._tensors[found.weights]]

    def _must_run_own_code(self, module: nn.Module) -> bool:
        # Experts of which other processes hold some are called with indices that mean "not here".
        split = self.kind == "experts" and getattr(module, "_is_expert_parallel", False)
        if split or is_empty(module):
            return True
        return self._is_changed(module) or has_hooks(module)

    def _is_changed(self, module: nn.Module) -> bool:
        """Whether the module's own code must run since it was changed; else it is read again where
        it was (an adapter put around a submodule, say, or switched off).
        """
        if self._guard.holds():
            return False
        types = types_below(module)
        if parametrize.ParametrizationList in set(types) - set(self._types):
            self.session.warn(
                f"moec: {self.name}: its weights got a parametrization after compilation; its own "
                "code runs. Compile again to include it."
            )
            return True
        if types != self._types:
            self._look_again(module)
        self._forget()
        self._types, self.settings = types, plain_settings(module)
        return False

    def _look_again(self, module: nn.Module) -> None:
        """Find the experts of a module whose submodules were replaced."""
        if self.kind == "experts":
            return
        with as_original(module):
            experts = experts_below(module)
        if self.inner is not None:
            restore(self.inner.candidate.module)
        self.candidate, self.inner = replace(self.candidate, experts=experts), None
        self.install_inner()

    def install_inner(self) -> None:
        """Make the experts below a region of their own."""
        raise NotImplementedError

    def settle(self, module: nn.Module) -> None:
        """After the module's own code ran: settings that it changed itself are no change by the
        user. What was captured under the old ones is dropped; what could not be is not tried again.
        """
        if not self._guard.holds() and types_below(module) == self._types:
            self.found = {mode: f for mode, f in self.found.items() if f.graph is None}
            self._tensors.clear()
            self.steady.clear()
            self._guard = Guard(module)


__all__ = ["RegionCaptures"]
