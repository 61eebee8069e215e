"""Comparing a captured region with the module that it was read from, before it is used."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from moec.call_form import CallForm, flattened, graph_inputs
from moec.capture.check_gradients import compare_gradients
from moec.capture.forms import INDICES, Form, as_routing
from moec.capture.reference import own_results
from moec.capture.trial import Trial
from moec.capture.writes import Write, refuse_writes
from moec.errors import CaptureError
from moec.exact_gradients import has_smaller_rows
from moec.interp import run
from moec.ir.graph import Graph
from moec.ir.types import DTYPES
from moec.share import trial_copy

SIZES = {3: ((1, 1), (2, 3), (1, 33), (3, 17)), 2: ((1,), (6,), (33,), (51,))}
# As many equal tokens, which all go to the same experts: a capacity shows only where it is
# exceeded.
EQUAL = {3: (1, 257), 2: (257,)}
SCALES = (1.0, 30.0)  # limits such as clamps show only far from zero
# Bytes of weights that are copied from a GPU to see whether tokens of rank 3 are taken, too.
LARGEST_COPY = 2**30
ROUNDED_ROWS = 1e-6  # a float64 result of rows that were rounded to float32
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}


def compare(
    module: nn.Module,
    graph: Graph,
    weights: Sequence[str],
    hidden: int,
    dtype: torch.dtype,
    rank: int,
    trial: Trial = Trial(),  # noqa: B008 (immutable)
    doubtful: Sequence[tuple[int, ...]] = (),
) -> None:
    """Raise :class:`CaptureError` unless interpreting ``graph`` gives what ``module`` gives, at
    several sizes and scales, among them the sizes ``doubtful`` that the tracer left out.

    ``module`` runs on random tokens ``[..., hidden]`` without gradients. On the meta device nothing
    can be compared.
    """
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    device = next(module.parameters()).device
    if device.type == "meta":
        return
    inputs = [tensors[path].detach() for path in weights]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for leading in (*SIZES[rank], *doubtful):
            for scale in SCALES:
                x = (torch.randn(*leading, hidden, generator=generator) * scale).to(device, dtype)
                compare_call(module, graph, trial.data(x, generator), inputs, trial.form)
        row = torch.randn(hidden, generator=generator).to(device, dtype)
        rows = row.expand(*EQUAL[rank], hidden).contiguous()
        compare_call(module, graph, trial.data(rows, generator), inputs, trial.form)
        x = torch.randn(*SIZES[rank][1], hidden, generator=generator).to(device, dtype)
    compare_gradients(module, graph, weights, trial.data(x, generator), trial.form)


def compare_experts(
    module: nn.Module, graph: Graph, weights: Sequence[str], experts: int, form: Form = INDICES
) -> None:
    """As :func:`compare` for experts called with tokens, routing and weights in a form.

    The indices are distinct experts a token; one batch sends all to the same.
    """
    device = next(module.parameters()).device
    if device.type == "meta":
        return
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    inputs = [tensors[path].detach() for path in weights]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for (tokens,) in (*SIZES[2], EQUAL[2]):
            for scale in SCALES:
                data = _routed(graph, tokens, experts, scale, generator, form, device)
                compare_call(module, graph, data, inputs, None)
        data = _routed(graph, SIZES[2][1][0], experts, 1.0, generator, form, device)
    compare_gradients(module, graph, weights, data, None)


def ranks_taken(module: nn.Module, graph: Graph, experts: int, form: Form) -> tuple[int, ...]:
    """The ranks of tokens for which an experts module gives a result of the tokens' shape."""
    device = next(module.parameters()).device
    size = sum(p.nbytes for p in module.parameters())
    if device.type == "meta" or (device.type != "cpu" and size > LARGEST_COPY):
        return (2,)
    generator = torch.Generator().manual_seed(0)
    x, *data = _routed(graph, 3, experts, 1.0, generator, form, torch.device("cpu"))
    trial = trial_copy(module)
    return tuple(
        rank for rank, tokens in ((2, x), (3, x.unsqueeze(0))) if _keeps_shape(trial, tokens, data)
    )


def _keeps_shape(module: nn.Module, x: torch.Tensor, data: Sequence[torch.Tensor]) -> bool:
    try:
        with torch.no_grad():
            return bool(module(x, *data).shape[:-1] == x.shape[:-1])
    except (RuntimeError, IndexError, ValueError, TypeError):  # no tokens of this rank
        return False


def _routed(
    graph: Graph,
    tokens: int,
    experts: int,
    scale: float,
    generator: torch.Generator,
    form: Form,
    device: torch.device,
) -> list[torch.Tensor]:
    """Tokens, routing and weights of one call; the largest number of tokens all goes one way."""
    x, idx, w = (v.type for v in graph.inputs[:3])
    hidden, choices = int(x.shape[-1]), int(idx.shape[1]) if idx.rank < 3 else int(w.shape[-1])
    order = torch.rand(tokens, experts, generator=generator).argsort(-1)[:, :choices]
    if (tokens,) == EQUAL[2]:
        order = order[:1].expand(tokens, -1).contiguous()
    data = [
        (torch.randn(tokens, hidden, generator=generator) * scale).to(DTYPES[x.dtype]),
        as_routing(form, order, experts),
        torch.rand(tokens, int(w.shape[-1]), generator=generator).to(DTYPES[w.dtype]),
    ]
    return [t.to(device) for t in data]


def compare_call(
    module: nn.Module,
    graph: Graph,
    data: list[torch.Tensor],
    inputs: list[torch.Tensor],
    form: CallForm | None,
    call: Sequence[Any] | None = None,
) -> None:
    """Compare one call with ``data``, which goes to the module as ``call`` if that is given.

    ``form`` is that of a block's call; experts and blocks with index arguments have none.
    """
    x = data[0]
    expected = own_results(module, data if call is None else call, form)
    ranks = [v.type.rank for v in graph.inputs]
    if form is not None:
        data = graph_inputs(form, ranks, data)
    else:
        data = [flattened(t, rank) for t, rank in zip(data, ranks, strict=False)]
    with torch.autocast(x.device.type, enabled=False):
        found = run(graph, [*data, *inputs])
    if len(found) != len(expected):
        raise CaptureError(
            f"{type(module).__name__} returned {len(expected)} tensors, its captured form "
            f"{len(found)}"
        )
    for ours, theirs in zip(found, expected, strict=True):
        if theirs.is_floating_point() and not theirs.isfinite().all():
            continue  # weights that nobody has set yet: nothing to compare
        error = _relative(ours, theirs)
        if not error <= _tolerance(theirs, graph):
            raise CaptureError(
                f"the captured form differs from {type(module).__name__} on tokens of shape "
                f"{tuple(x.shape)} by {error:.1e}"
            )


def _tolerance(value: torch.Tensor, graph: Graph) -> float:
    """What rounding may do: under autocast the products are taken in its dtype.

    Kernels round an element one way in the middle of a tensor and another at its end, so float32
    arithmetic on rows, of which the graph has all and the module one expert's, differs in a bit.
    """
    device = value.device.type
    dtypes = (value.dtype, autocast_dtype(device) or value.dtype)
    allowed = max(TOLERANCE.get(dtype, 1e-4) for dtype in dtypes)
    return max(allowed, ROUNDED_ROWS) if has_smaller_rows(graph) else allowed


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype of autocast on a type of device, ``None`` where it is off or does not exist."""
    available = torch.amp.is_autocast_available(device)
    return (
        torch.get_autocast_dtype(device)
        if available and torch.is_autocast_enabled(device)
        else None
    )


def _relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    if ours.numel() != theirs.numel():
        return float("inf")
    difference = ours.reshape(-1).double() - theirs.reshape(-1).double()
    scale = theirs.double().norm().item()
    return float(difference.norm().item() / max(scale, 1e-30)) if scale or difference.any() else 0.0


@contextlib.contextmanager
def unchanged(module: nn.Module, plain: bool = False) -> Iterator[list[Write]]:
    """Run a module's code for its result only: what it changes of itself is put back, then refused.

    Raises :class:`CaptureError` at the end if attributes or buffers were changed: a compiled call
    would not change them. With ``plain``, attributes set to plain values are given in the list
    instead.
    """
    states = [_State(name, child) for name, child in module.named_modules()]
    device = next(module.parameters()).device
    forked = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    writes: list[Write] = []
    with forked, _without_hooks(module):
        try:
            yield writes
        finally:
            changed = [change for state in states for change in state.put_back()]
    refuse_writes([write for write in changed if not (plain and write.is_plain)])
    writes += changed


def constant_writes(
    module: nn.Module,
    writes: Sequence[Write],
    hidden: int,
    dtype: torch.dtype,
    rank: int,
    trial: Trial,
) -> tuple[Write, ...]:
    """The writes of a block, which must be the same at every size; else :class:`CaptureError`."""
    device, generator = next(module.parameters()).device, torch.Generator().manual_seed(0)
    for leading in SIZES[rank] if writes else ():
        x = torch.randn(*leading, hidden, generator=generator).to(device, dtype)
        with unchanged(module, plain=True) as again, torch.no_grad():
            trial.form.call(module, trial.data(x, generator))
        refuse_writes(
            [write for write in (*writes, *again) if (write in writes) != (write in again)]
        )
    return tuple(writes)


@contextlib.contextmanager
def _without_hooks(module: nn.Module) -> Iterator[None]:
    """Keep trial runs from a user's hooks, which count or record real ones."""
    saved = [(vars(m), name, vars(m)[name]) for m in module.modules() for name in _HOOKS]
    for own, name, _ in saved:
        own[name] = OrderedDict()
    try:
        yield
    finally:
        for own, name, hooks in saved:
            own[name] = hooks


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class _State:
    """The attributes and buffers of one module, to be put back later."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, module
        self.attributes = {k: v for k, v in vars(module).items() if k not in _REGISTRIES}
        self.contents = {k: _contents(v) for k, v in self.attributes.items()}
        buffers = module.named_buffers(recurse=False)
        self.buffers = [(k, t, t._version, t.detach().clone()) for k, t in buffers]

    def put_back(self) -> list[Write]:
        """Undo every change; returns what was changed, with the values that it had been given."""
        return [*self._attributes(), *self._buffers()]

    def _attributes(self) -> Iterator[Write]:
        own = vars(self.module)
        for key in [k for k in own if k not in _REGISTRIES and k not in self.attributes]:
            yield Write(self.name, key, own.pop(key))
        for key, value in self.attributes.items():
            now, then = own.get(key, _MISSING), self.contents[key]
            if now is value and _contents(value) == then:
                continue
            own[key] = _refilled(value, then)
            if now is value or not _same_members(now, value):
                yield Write(self.name, key, now)

    def _buffers(self) -> Iterator[Write]:
        for key, tensor, version, saved in self.buffers:
            replaced = self.module._buffers.get(key) is not tensor
            if replaced or tensor._version != version:
                self.module._buffers[key] = tensor
                with torch.no_grad():
                    tensor.copy_(saved)
                yield Write(self.name, f"{key} (buffer)", tensor)


_REGISTRIES = {*vars(nn.Module()), "_moec_interface"}
_MISSING = object()


def _contents(value: Any) -> Any:
    """The members of a container by identity, to see whether it was changed in place."""
    if isinstance(value, dict):
        return [(id(k), id(v), k, v) for k, v in value.items()]
    return [(id(v), v) for v in value] if isinstance(value, list | set) else None


def _same_members(now: Any, then: Any) -> bool:
    """Whether two values are one, or containers of the same members: tracers put back copies."""
    if now is then or type(now) is not type(then) or not isinstance(then, dict | list):
        return now is then
    if isinstance(then, list):
        return len(now) == len(then) and all(map(_same_members, now, then))
    keys = list(now) == list(then)
    return keys and all(map(_same_members, now.values(), then.values()))


def _refilled(value: Any, contents: Any) -> Any:
    """A container with the members that it had."""
    if isinstance(value, dict):
        members = [(k, v) for _, _, k, v in contents]
        value.clear()
        value.update(members)
    elif isinstance(value, list | set):
        members = [v for _, v in contents]
        value.clear()
        (value.extend if isinstance(value, list) else value.update)(members)
    return value
