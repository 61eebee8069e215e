"""A region of a model at run time: which artifact serves a call, and the compilation behind it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from moec.arguments import check_inputs, fits
from moec.call_form import (
    MAX_FAILED_FORMS,
    MAX_FORMS,
    TOKENS_ALONE,
    Call,
    CallForm,
    flattened,
    graph_inputs,
    read_call,
)
from moec.capture.arguments import arguments_of
from moec.capture.check import autocast_dtype
from moec.capture.found import Candidate, FoundRegion, join
from moec.capture.writes import apply_writes
from moec.compiled import install, region_of
from moec.ir.graph import Graph
from moec.mode import Mode, is_out_of_range, no_autocast
from moec.region_captures import RegionCaptures
from moec.runtime.artifact import Artifact
from moec.session import Session
from moec.steady import Steady, is_plain_call, steady_call
from moec.surroundings import is_traced, is_transformed, odd_reason, odd_tensor
from moec.traced import call_traced, number


class Region(RegionCaptures):
    """One block (or one experts module) of a compiled model.

    ``name`` is its module path, ``status`` "compiled", "experts only" or "left as it was",
    ``reason`` why; ``artifacts`` are the compiled forms in use, ``history`` the graphs after each
    pass of the first one.
    """

    def __init__(self, session: Session, candidate: Candidate, kind: str) -> None:
        super().__init__(session, candidate, kind)
        self.number = number(self)

    def bound_to(self, module: nn.Module) -> Region:
        """This region for a copy of its module: same captures and artifacts, the copy's weights."""
        self._is_changed(self.candidate.module)  # what the copy takes over must be up to date
        new = Region(self.session, replace(self.candidate, module=module), self.kind)
        new.found = {mode: replace(found, module=module) for mode, found in self.found.items()}
        new.artifacts, new.check = list(self.artifacts), self.check
        if self.candidate.experts is not None:
            new.inner = region_of(module.get_submodule(self.candidate.experts))
        return new

    def install_inner(self) -> None:
        """Make the experts below a region of their own: it serves where the whole block is not
        compiled.
        """
        path = self.candidate.experts
        if path is not None:
            experts = self.candidate.module.get_submodule(path)
            inner = Candidate(join(self.candidate.name, path), experts, None)
            self.inner = Region(self.session, inner, "experts")
            install(experts, self.inner)

    def call(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Serve a call, or give ``NotImplemented`` if the module's own code must run."""
        plain = is_plain_call(args, kwargs)
        if plain:
            steady = self.steady.get(Steady.mode(module, args[0]))
            if steady is not None and steady.holds(args[0]):
                served = steady.serve(args[0])
                if served is not NotImplemented:
                    return served
        if is_transformed():
            return NotImplemented
        if is_traced():
            return call_traced(module, args, kwargs, self)
        if self.candidate.dense is not None and self.candidate.dense.extra:
            return self._call_with_extras(module, [*args, *self._in_order(kwargs).values()])
        if self.kind == "experts":
            return self._call_experts(module, [*args, *self._in_order(kwargs).values()])
        call = read_call(type(self.candidate.module), args, kwargs)
        if isinstance(call, str):
            self._note_form(call)
            return NotImplemented
        if self._must_run_own_code(module):
            return NotImplemented
        return self._serve(module, call.tensors, lambda: self._found_for(module, call), plain)

    def _call_with_extras(self, module: nn.Module, values: Sequence[Any]) -> Any:
        """Serve a call with arguments after the tokens that name experts, in the first form that
        fits.
        """
        form, x = self.candidate.dense, values[0] if values else None
        if not isinstance(x, torch.Tensor) or x.dim() not in (2, 3) or form is None:
            return NotImplemented
        if self._must_run_own_code(module):
            return NotImplemented
        autocast = autocast_dtype(x.device.type)
        plain = Mode(module.training, x.dtype, x.dim(), autocast, device=x.device)
        for extras in form.arguments(x.dim()):
            data = arguments_of(extras, x, values[1:])
            mode = replace(plain, extras=extras)
            if data is not None and self._capture(mode).graph is not None:
                return self._serve(module, data, functools.partial(self._capture, mode))
        return NotImplemented

    def _call_experts(self, module: nn.Module, data: Sequence[Any]) -> Any:
        if len(data) != 3 or not all(isinstance(v, torch.Tensor) for v in data):
            return NotImplemented
        if self._must_run_own_code(module):
            return NotImplemented
        x, _, w = data
        autocast, choices = autocast_dtype(x.device.type), w.shape[-1]  # masks have E columns
        mode = Mode(module.training, x.dtype, 2, autocast, choices, w.dtype, device=x.device)
        return self._serve(module, data, lambda: self.capture(mode))

    def _serve(
        self,
        module: nn.Module,
        data: Sequence[torch.Tensor],
        find: Callable[[], FoundRegion | None],
        plain: bool = False,
    ) -> Any:
        """Run the capture that serves a call; made anew after weights were replaced by others of
        another dtype or shape.
        """
        for _ in range(2):
            found = find()
            if found is None or found.graph is None or data[0].dim() not in found.ranks:
                return NotImplemented
            if self.kind == "experts" and is_out_of_range(found.graph, data[1]):
                return NotImplemented
            if fits(found.graph, self._weights(found, module)):
                return self._run(found, module, data, plain)
            self._forget()
        return NotImplemented

    def _found_for(self, module: nn.Module, call: Call) -> FoundRegion | None:
        """The capture that serves a call, if there is one: of its forms, one known before goes
        first.
        """
        x = call.tensors[0]
        autocast = autocast_dtype(x.device.type)
        known = Mode(module.training, x.dtype, x.dim(), autocast, device=x.device)
        modes = [replace(known, form=form) for form in call.forms()]
        for mode in modes:
            if mode in self.found and self.found[mode].graph is not None:
                return self.found[mode]
        values = {
            n: t.detach()
            for n, t in zip(call.names, call.tensors, strict=True)
            if not t.is_floating_point()
        }
        for mode in modes:
            if self._is_one_too_many(mode):
                self._note_form("other values of its arguments come with every call")
                return None
            if (found := self.capture(mode, values)).graph is not None:
                return found
        self.unserved = self.unserved or self.found[modes[0]].reason
        return None

    def _is_one_too_many(self, mode: Mode) -> bool:
        if mode in self.found:
            return False
        same = [f for m, f in self.found.items() if replace(m, form=mode.form) == mode]
        failed = sum(f.graph is None for f in same)  # sizes that follow the length give new forms
        return len(same) >= MAX_FORMS or failed >= MAX_FAILED_FORMS

    def _note_form(self, reason: str) -> None:
        """Remember, and say once, that a call had arguments which no captured form takes."""
        if self.unserved:
            return
        self.unserved = reason
        if self.inner is None:
            kind = type(self.candidate.module).__name__
            self.session.warn(
                f"moec: {self.name or 'the model'} ({kind}) runs its own code: {self.unserved}",
                f"{kind} {self.unserved}",
            )

    def _in_order(self, kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        """Named arguments in the order of the module's own parameters."""
        if len(kwargs) < 2:
            return kwargs
        cls: Any = type(self.candidate.module)
        own = inspect.unwrap(cls._moec_original.forward)
        known = [n for n in inspect.signature(own).parameters if n in kwargs]
        return {n: kwargs[n] for n in known} if len(known) == len(kwargs) else kwargs

    def _run(
        self,
        found: FoundRegion,
        module: nn.Module,
        data: Sequence[torch.Tensor],
        plain: bool = False,
    ) -> Any:
        graph = found.graph
        if graph is None:
            return NotImplemented
        weights = self._weights(found, module)
        inputs = [*self._data(graph, found, data), *weights]
        odd = odd_tensor(inputs)
        if odd is not None:
            self._left_odd(odd_reason(odd))
            return NotImplemented
        check_inputs(self.name, graph, inputs)
        if self.session.limits is not None:
            graph = self.session.limits.for_call(graph, inputs, self.name)
        wanted = tuple(t.requires_grad for t in inputs)
        training = torch.is_grad_enabled() and any(wanted)
        artifact = self.session.artifact(
            graph, wanted if training else None, data[0].device, inputs, self.name
        )
        if artifact is None:
            return NotImplemented
        if artifact not in self.artifacts:
            self.artifacts.append(artifact)
        if plain and len(data) == 1 and autocast_dtype(data[0].device.type) is None:
            x = data[0]
            made = steady_call(module, x, found, artifact, weights, self._guard, self.name)
            if made is not None:
                self.steady[Steady.mode(module, x)] = made
        with no_autocast(data[0].device.type):
            outputs = artifact(inputs, self.name)
        apply_writes(module, found.writes)
        return found.result.build(outputs, data[0].shape[:-1])

    def prepare(
        self,
        training: bool,
        dtype: torch.dtype,
        rank: int,
        choices: int,
        weight_dtype: torch.dtype,
        grad: bool,
        data_grad: int,
        form: CallForm = TOKENS_ALONE,
        is_within_limits: bool = False,
    ) -> tuple[FoundRegion, Artifact] | None:
        """The capture and the artifact for a call that a tracer describes; ``None`` if the module's
        own code must run.

        Bit ``i`` of ``data_grad`` says whether the ``i``-th tensor of the call requires a gradient;
        ``is_within_limits``, that the tracer knows it to keep to the limits of declared inputs.
        """
        module = self.candidate.module
        if self._must_run_own_code(module):
            return None
        device = next(module.parameters()).device
        autocast = autocast_dtype(device.type)
        mode = Mode(training, dtype, rank, autocast, form=form, device=device)
        if self.kind == "experts":
            mode = replace(mode, rank=2, choices=choices, weight_dtype=weight_dtype)
        found = self.capture(mode)
        if found.graph is not None and not fits(found.graph, self._weights(found, module)):
            self._forget()
            found = self.capture(mode)
        if found.graph is None or rank not in found.ranks:
            return None
        apply_writes(module, found.writes)  # constants: setting them once while tracing is enough
        weights = self._weights(found, module)
        if odd_tensor(weights, fake=True) is not None:
            return None
        count = len(found.graph.inputs) - len(weights)
        wanted = (
            *(bool(data_grad >> i & 1) for i in range(count)),
            *(t.requires_grad for t in weights),
        )
        limits = self.session.limits if is_within_limits else None
        artifact = self.session.artifact(
            found.graph if limits is None else limits.narrowed(found.graph),
            wanted if grad and any(wanted) else None,
            weights[0].device,
            name=self.name,
        )
        if artifact is None:
            return None
        if artifact not in self.artifacts:
            self.artifacts.append(artifact)
        return found, artifact

    def _data(
        self, graph: Graph, found: FoundRegion, data: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        ranks = [v.type.rank for v in graph.inputs]
        if self.kind == "experts" or self.candidate.dense is not None:
            return [flattened(t, rank) for t, rank in zip(data, ranks, strict=False)]
        return graph_inputs(found.form, ranks, data)


__all__ = ["Region"]
