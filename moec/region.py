"""A region of a model at run time: which artifact serves a call, and the compilation behind it."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from moec.arguments import check_inputs, fits
from moec.call_form import (
    MAX_FORMS,
    TOKENS_ALONE,
    Call,
    CallForm,
    flattened,
    graph_inputs,
    read_call,
)
from moec.capture.arguments import Extra, arguments_of
from moec.capture.check import autocast_dtype
from moec.capture.regions import (
    Candidate,
    FoundRegion,
    capture_experts,
    capture_whole,
    experts_below,
    join,
)
from moec.capture.trial import Trial
from moec.capture.writes import apply_writes
from moec.compiled import as_original, install, region_of, restore
from moec.errors import CallError
from moec.guards import Guard
from moec.ir.graph import Graph
from moec.manager import Step
from moec.result_form import ResultForm
from moec.runtime.artifact import Artifact
from moec.session import Session
from moec.share import share
from moec.structure import plain_settings, structure_key
from moec.surroundings import is_traced, is_transformed, isolated, odd_reason, odd_tensor
from moec.targets import choose_target
from moec.traced import call_traced, number

_CPU = torch.device("cpu")

# Tracers have state of the whole process: one capture at a time.
_READING = threading.RLock()


@dataclass(frozen=True)
class Mode:
    """What a capture depends on beyond the module's structure."""

    training: bool
    dtype: torch.dtype
    rank: int
    autocast: torch.dtype | None
    choices: int = 0
    weight_dtype: torch.dtype | None = None
    form: CallForm = TOKENS_ALONE
    device: torch.device = _CPU
    extras: tuple[Extra, ...] = ()


class Region:
    """One block (or one experts module) of a compiled model.

    ``name`` is its module path, ``status`` "compiled", "experts only" or "left as it was",
    ``reason`` why; ``artifacts`` are the compiled forms in use, ``history`` the graphs after each
    pass of the first one.
    """

    def __init__(self, session: Session, candidate: Candidate, kind: str) -> None:
        self.session, self.candidate, self.kind = session, candidate, kind
        self.name = candidate.name
        self.found: dict[Mode, FoundRegion] = {}
        self.traced: dict[str, tuple[CallForm, ResultForm]] = {}
        self.artifacts: list[Artifact] = []
        self.inner: Region | None = None
        self.unserved = ""
        self.number = number(self)
        self._types = _types_below(candidate.module)
        self._guard = Guard(candidate.module)
        self.settings = plain_settings(candidate.module)
        self._tensors: dict[tuple[str, ...], list[tuple[nn.Module, str]]] = {}

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
        if self.first is None and _is_empty(self.candidate.module):
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
            odd = odd_tensor(self.candidate.module.parameters())
            if odd is not None:
                return self._left_odd(odd)
            self._refuse_dtype(self._capture(mode, values), mode)
            self._report(self.found[mode])
        return self.found[mode]

    def _left_odd(self, tensor: torch.Tensor) -> FoundRegion:
        """Nothing captured, since a weight is of a kind that compiled code cannot take; tried again
        at the next call.
        """
        self.unserved = odd_reason(tensor)
        module, name = self.candidate.module, self.name or "the model"
        self.session.warn(
            f"moec: {name} ({type(module).__name__}) runs its own code: {self.unserved}"
        )
        return FoundRegion(self.name, module, self.kind, None, reason=self.unserved)

    def _capture(self, mode: Mode, values: Mapping[str, torch.Tensor] | None = None) -> FoundRegion:
        if mode not in self.found:
            module = self.candidate.module
            key = (structure_key(module), mode, self.kind)
            isolated(lambda: self._read_once(key, mode, values or {}), mode.device)
            self.found[mode] = replace(self.session.captures[key], name=self.name, module=module)
        return self.found[mode]

    def _read_once(self, key: Hashable, mode: Mode, values: Mapping[str, torch.Tensor]) -> None:
        with _READING:
            if key not in self.session.captures:
                self.session.captures[key] = self._read(mode, values)

    def try_capture(self) -> None:
        """Capture in the model's present mode, so that what stays as it was is known at once."""
        module = self.candidate.module
        parameter = next((p for p in module.parameters() if p.is_floating_point()), None)
        if parameter is None or _is_empty(module):
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
            if _is_empty(inner.candidate.module):
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

    def bound_to(self, module: nn.Module) -> Region:
        """This region for a copy of its module: same captures and artifacts, the copy's weights."""
        self._is_changed(self.candidate.module)  # what the copy takes over must be up to date
        new = Region(self.session, replace(self.candidate, module=module), self.kind)
        new.found = {mode: replace(found, module=module) for mode, found in self.found.items()}
        new.artifacts = list(self.artifacts)
        if self.candidate.experts is not None:
            new.inner = region_of(module.get_submodule(self.candidate.experts))
        return new

    def _read(self, mode: Mode, values: Mapping[str, torch.Tensor]) -> FoundRegion:
        """Capture a twin of the module: other threads may be calling the module itself."""
        twin = share(self.candidate.module)
        candidate = replace(self.candidate, module=twin)
        with as_original(twin), _capture_autocast(mode):
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
            kind + reason.replace(self.name, ""),
        )

    # calls
    def call(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Serve a call, or give ``NotImplemented`` if the module's own code must run."""
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
        return self._serve(module, call.tensors, lambda: self._found_for(module, call))

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
        x, idx, w = data
        autocast, choices = autocast_dtype(x.device.type), idx.shape[-1]
        mode = Mode(module.training, x.dtype, 2, autocast, choices, w.dtype, device=x.device)
        return self._serve(module, data, lambda: self.capture(mode))

    def _serve(
        self,
        module: nn.Module,
        data: Sequence[torch.Tensor],
        find: Callable[[], FoundRegion | None],
    ) -> Any:
        """Run the capture that serves a call; made anew after weights were replaced by others of
        another dtype or shape.
        """
        for _ in range(2):
            found = find()
            if found is None or found.graph is None or data[0].dim() not in found.ranks:
                return NotImplemented
            if self.kind == "experts" and _is_out_of_range(found.graph, data[1]):
                return NotImplemented
            if fits(found.graph, self._weights(found, module)):
                return self._run(found, module, data)
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
        same = [m for m in self.found if replace(m, form=mode.form) == mode]
        return mode not in self.found and len(same) >= MAX_FORMS

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

    def _run(self, found: FoundRegion, module: nn.Module, data: Sequence[torch.Tensor]) -> Any:
        graph = found.graph
        if graph is None:
            return NotImplemented
        inputs = [*self._data(graph, found, data), *self._weights(found, module)]
        odd = odd_tensor(inputs)
        if odd is not None:
            self._left_odd(odd)
            return NotImplemented
        check_inputs(self.name, graph, inputs)
        wanted = tuple(t.requires_grad for t in inputs)
        training = torch.is_grad_enabled() and any(wanted)
        artifact = self.session.artifact(
            graph, wanted if training else None, data[0].device, inputs, self.name
        )
        if artifact is None:
            return NotImplemented
        if artifact not in self.artifacts:
            self.artifacts.append(artifact)
        with _no_autocast(data[0].device.type):
            outputs = artifact(inputs)
        apply_writes(module, found.writes)
        return found.result.build(outputs, data[0].shape[:-1])

    def _forget(self) -> None:
        self.found.clear()
        self._tensors.clear()
        self._guard = Guard(self.candidate.module)

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
    ) -> tuple[FoundRegion, Artifact] | None:
        """The capture and the artifact for a call that a tracer describes; ``None`` if the module's
        own code must run.

        Bit ``i`` of ``data_grad`` says whether the ``i``-th tensor of the call requires a gradient.
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
        artifact = self.session.artifact(
            found.graph,
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
        if split or _is_empty(module):
            return True
        return self._is_changed(module) or _has_hooks(module, self)

    def _is_changed(self, module: nn.Module) -> bool:
        """Whether the module's own code must run since it was changed; else it is read again where
        it was (an adapter put around a submodule, say, or switched off).
        """
        if self._guard.holds():
            return False
        types = _types_below(module)
        if parametrize.ParametrizationList in set(types) - set(self._types):
            self.session.warn(
                f"moec: {self.name}: its weights got a parametrization after compilation; its own "
                "code runs. Compile again to include it."
            )
            return True
        if types != self._types:
            self._look_again(module)
        self._types, self.settings = types, plain_settings(module)
        self._forget()
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
        """Make the experts below a region of their own: it serves where the whole block is not
        compiled.
        """
        path = self.candidate.experts
        if path is not None:
            experts = self.candidate.module.get_submodule(path)
            inner = Candidate(join(self.candidate.name, path), experts, None)
            self.inner = Region(self.session, inner, "experts")
            install(experts, self.inner)

    def settle(self, module: nn.Module) -> None:
        """After the module's own code ran: settings that it changed itself are no change by the
        user. What was captured under the old ones is dropped; what could not be is not tried again.
        """
        if not self._guard.holds() and _types_below(module) == self._types:
            self.found = {mode: f for mode, f in self.found.items() if f.graph is None}
            self._tensors.clear()
            self._guard = Guard(module)


def _types_below(module: nn.Module) -> list[type]:
    return [getattr(m, "_moec_original", type(m)) for m in module.modules()]


def _is_out_of_range(graph: Graph, idx: torch.Tensor) -> bool:
    """Whether an index names neither an expert nor "none", seen only where it costs nothing.

    What the module's own code does then, an error mostly, is up to that code. On a GPU nobody can
    look without waiting; there such a pair adds nothing.
    """
    experts = _experts_of(graph)
    if experts is None or idx.device.type != "cpu" or idx.numel() == 0:
        return False
    low, high = torch.aminmax(idx)
    return bool(low < 0) or int(high) > experts


@functools.cache
def _experts_of(graph: Graph) -> int | None:
    """How many experts the indices of an experts module name; ``None`` if it is called with masks
    or has groups of experts.
    """
    counts = [int(op.attrs["experts"]) for op in graph.ops if op.kind == "moe.dispatch"]
    by_index = graph.inputs[1].type.dtype == "i64" and graph.inputs[1].type.rank == 2
    return counts[0] if by_index and len(counts) == 1 else None


def _is_empty(module: nn.Module) -> bool:
    """Whether a module's weights, all of them, have no values yet."""
    return all(p.is_meta for p in module.parameters())


def _has_hooks(module: nn.Module, region: Region) -> bool:
    """Whether a module inside has hooks: they must see their own inputs and outputs."""
    if torch.nn.modules.module._has_any_global_hook():  # type: ignore[no-untyped-call]  # those of every module in the process
        return True
    return any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
        for m in module.modules()
        if m is not module
    )


def _no_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Emitted code has its casts written out."""
    if autocast_dtype(device_type) is not None:
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


@contextlib.contextmanager
def _capture_autocast(mode: Mode) -> Iterator[None]:
    """Capture under the caller's autocast, without its cache of cast weights."""
    if mode.autocast is None:
        yield
        return
    with torch.autocast(mode.device.type, dtype=mode.autocast, cache_enabled=False):
        yield


__all__ = ["Region"]
