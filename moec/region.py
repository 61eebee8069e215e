"""A region of a model at run time: which artifact serves a call, and the compilation behind it."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree

from moec.capture.arguments import Extra, arguments_of
from moec.capture.check import autocast_dtype
from moec.capture.regions import Candidate, FoundRegion, capture_experts, capture_whole
from moec.compiled import as_original, region_of
from moec.errors import CallError
from moec.guards import Guard
from moec.ir.graph import Graph, Value
from moec.manager import Step
from moec.runtime.artifact import Artifact
from moec.session import Session
from moec.structure import structure_key
from moec.targets import choose_target
from moec.traced import number


@dataclass(frozen=True)
class _Mode:
    """What a capture depends on beyond the module's structure."""

    training: bool
    dtype: torch.dtype
    rank: int
    autocast: torch.dtype | None
    choices: int = 0
    weight_dtype: torch.dtype | None = None
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
        self.found: dict[_Mode, FoundRegion] = {}
        self.artifacts: list[Artifact] = []
        self.inner: Region | None = None
        self.unserved = ""
        self.number = number(self)
        self._types = _types_below(candidate.module)
        self._guard = Guard(candidate.module)
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
        reason = "" if self.first is None else self.first.reason
        return reason or ("" if self.artifacts else self.unserved)

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
    def capture(self, mode: _Mode) -> FoundRegion:
        """The region's IR in a mode; structurally equal modules are captured once a session."""
        if mode not in self.found:
            self._refuse_dtype(self._capture(mode), mode)
            self._report(self.found[mode])
        return self.found[mode]

    def _capture(self, mode: _Mode) -> FoundRegion:
        if mode not in self.found:
            module = self.candidate.module
            with as_original(module):
                key = (structure_key(module), mode, self.kind)
                if key not in self.session.captures:
                    with _capture_autocast(mode, module):
                        self.session.captures[key] = self._read(mode)
            self.found[mode] = replace(self.session.captures[key], name=self.name, module=module)
        return self.found[mode]

    def try_capture(self) -> None:
        """Capture in the model's present mode, so that what stays as it was is known at once."""
        module = self.candidate.module
        parameter = next((p for p in module.parameters() if p.is_floating_point()), None)
        if parameter is None:
            return
        if self.candidate.dense is not None and self.candidate.dense.extra:
            self._try_forms(_Mode(module.training, parameter.dtype, 3, None))
        elif self.kind == "block":
            self._try_ranks(_Mode(module.training, parameter.dtype, 3, None))
        if self.status != "compiled":
            inner = self.inner if self.inner is not None else self
            if inner.kind == "experts":
                inner.capture(_Mode(module.training, parameter.dtype, 2, None, 2, parameter.dtype))

    def _try_ranks(self, mode: _Mode) -> None:
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

    def _try_forms(self, mode: _Mode) -> None:
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
        new = Region(self.session, replace(self.candidate, module=module), self.kind)
        new.found = {mode: replace(found, module=module) for mode, found in self.found.items()}
        new.artifacts = list(self.artifacts)
        if self.candidate.experts is not None:
            new.inner = region_of(module.get_submodule(self.candidate.experts))
        return new

    def _read(self, mode: _Mode) -> FoundRegion:
        if self.kind == "experts":
            return capture_experts(
                self.candidate, mode.dtype, mode.choices, mode.weight_dtype or torch.float32
            )
        return capture_whole(self.candidate, mode.dtype, mode.rank, mode.extras)

    def _refuse_dtype(self, found: FoundRegion, mode: _Mode) -> None:
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
        kind = type(self.candidate.module).__name__
        self.session.warn(
            f"moec: {self.name or 'the model'} ({kind}) stays as it was: {found.reason}. "
            "moec.explain(model) lists all regions.",
            kind + found.reason.replace(self.name, ""),
        )

    # calls
    def call(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Serve a call, or give ``NotImplemented`` if the module's own code must run."""
        if self.candidate.dense is not None and self.candidate.dense.extra:
            return self._call_form(module, [*args, *self._in_order(kwargs).values()])
        data = _tensor_arguments(self.kind, args, self._in_order(kwargs))
        if data is None:
            self._note_form(len(args) + len(kwargs))
            return NotImplemented
        if self._is_changed(module) or _has_hooks(module, self):
            return NotImplemented
        found = self.capture(self._mode(module, data))
        if found.graph is None:
            return NotImplemented
        return self._run(found, module, data)

    def _call_form(self, module: nn.Module, values: Sequence[Any]) -> Any:
        """Serve a call with arguments after the tokens, in the first form that fits."""
        form, x = self.candidate.dense, values[0] if values else None
        if not isinstance(x, torch.Tensor) or x.dim() not in (2, 3) or form is None:
            return NotImplemented
        if self._is_changed(module) or _has_hooks(module, self):
            return NotImplemented
        for extras in form.arguments(x.dim()):
            data = arguments_of(extras, x, values[1:])
            if data is None:
                continue
            found = self._capture(replace(self._mode(module, [x]), extras=extras))
            if found.graph is not None:
                return self._run(found, module, data)
        return NotImplemented

    def _note_form(self, count: int) -> None:
        """Remember, and say once, that a call had arguments which the captured form does not
        take.
        """
        if self.unserved or self.kind == "experts":
            return
        self.unserved = f"it is called with {count} arguments, not with one tensor of tokens alone"
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

    def _mode(self, module: nn.Module, data: Sequence[torch.Tensor]) -> _Mode:
        x = data[0]
        autocast = autocast_dtype(x.device.type)
        if self.kind == "experts":
            return _Mode(module.training, x.dtype, 2, autocast, data[1].shape[-1], data[2].dtype)
        return _Mode(module.training, x.dtype, x.dim(), autocast)

    def _run(self, found: FoundRegion, module: nn.Module, data: Sequence[torch.Tensor]) -> Any:
        graph = found.graph
        if graph is None:
            return NotImplemented
        inputs = [*self._data(graph, found, data), *self._weights(found, module)]
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
        shaped = [
            o.reshape(_result_shape(t, data[0], o))
            for o, t in zip(outputs, found.results, strict=True)
        ]
        return _pytree.tree_unflatten(shaped, found.tree) if found.tree is not None else shaped[0]

    def prepare(
        self,
        training: bool,
        dtype: torch.dtype,
        rank: int,
        choices: int,
        weight_dtype: torch.dtype,
        grad: bool,
        data_grad: int,
    ) -> tuple[FoundRegion, Artifact] | None:
        """The capture and the artifact for a call that a tracer describes; ``None`` if the module's
        own code must run.

        Bit ``i`` of ``data_grad`` says whether the ``i``-th tensor of the call requires a gradient.
        """
        module = self.candidate.module
        if self._is_changed(module) or _has_hooks(module, self):
            return None
        autocast = autocast_dtype(next(module.parameters()).device.type)
        mode = _Mode(training, dtype, rank, autocast)
        if self.kind == "experts":
            mode = _Mode(training, dtype, 2, autocast, choices, weight_dtype)
        found = self.capture(mode)
        if found.graph is None:
            return None
        weights = self._weights(found, module)
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
        return [
            t.reshape(-1, *t.shape[t.dim() - v.type.rank + 1 :]) if t.dim() > v.type.rank else t
            for t, v in zip(data, graph.inputs, strict=False)
        ]

    def _weights(self, found: FoundRegion, module: nn.Module) -> list[torch.Tensor]:
        if found.weights not in self._tensors:
            places = []
            for path in found.weights:
                owner, _, name = path.rpartition(".")
                places.append((module.get_submodule(owner), name))
            self._tensors[found.weights] = places
        return [getattr(owner, name) for owner, name in self._tensors[found.weights]]

    def _is_changed(self, module: nn.Module) -> bool:
        """Whether a submodule was replaced since compilation (an adapter put around it, say)."""
        if self._guard.holds():
            return False
        if _types_below(module) == self._types:  # others of the same classes, or other settings
            self.found.clear()
            self._tensors.clear()
            self._guard = Guard(module)
            return False
        self.session.warn(
            f"moec: {self.name}: a submodule was replaced after compilation; its own code runs. "
            "Compile again to include it."
        )
        return True


def _types_below(module: nn.Module) -> list[type]:
    return [getattr(m, "_moec_original", type(m)) for m in module.modules()]


def _has_hooks(module: nn.Module, region: Region) -> bool:
    """Whether a module inside has hooks: they must see their own inputs and outputs."""
    return any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
        for m in module.modules()
        if m is not module
    )


def _tensor_arguments(
    kind: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[torch.Tensor] | None:
    """The tensors of a call in order, if it has the form that was captured."""
    values = [*args, *kwargs.values()]
    wanted = 3 if kind == "experts" else 1
    if len(values) != wanted or not all(isinstance(v, torch.Tensor) for v in values):
        return None
    return values


def _result_shape(
    declared: tuple[Any, ...], x: torch.Tensor, value: torch.Tensor
) -> tuple[int, ...]:
    """The shape of a result in the module's own form: "lead" stands for the axes of the tokens."""
    return (*x.shape[:-1], value.shape[-1]) if declared else tuple(value.shape)


def check_inputs(name: str, graph: Graph, inputs: Sequence[torch.Tensor]) -> None:
    """Refuse wrong dtypes, shapes and devices before anything runs, naming the input."""
    device = inputs[0].device
    for value, tensor in zip(graph.inputs, inputs, strict=True):
        fits = tensor.dim() == value.type.rank and all(
            not isinstance(d, int) or d == s
            for d, s in zip(value.type.shape, tensor.shape, strict=True)
        )
        if not fits:
            raise CallError(
                f"{name}: %{value.hint} must be {value.type}, got shape {tuple(tensor.shape)}"
            )
        if tensor.dtype != _torch_dtype(value):
            raise CallError(
                f"{name}: %{value.hint} must be {value.type}, got {tensor.dtype}; cast it, "
                "or compile the model in that dtype"
            )
        if tensor.device != device:
            raise CallError(
                f"{name}: %{value.hint} is on {tensor.device}, the tokens are on {device}; "
                "move the model or the input"
            )


def _torch_dtype(value: Value) -> torch.dtype:
    from moec.ir.types import DTYPES

    return DTYPES[value.type.dtype]


def _no_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Emitted code has its casts written out."""
    if autocast_dtype(device_type) is not None:
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


@contextlib.contextmanager
def _capture_autocast(mode: _Mode, module: nn.Module) -> Iterator[None]:
    """Capture under the caller's autocast, without its cache of cast weights."""
    if mode.autocast is None:
        yield
        return
    device = next(module.parameters()).device.type
    with torch.autocast(device, dtype=mode.autocast, cache_enabled=False):
        yield


__all__ = ["Region", "check_inputs"]
