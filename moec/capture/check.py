"""Comparing a captured region with the module that it was read from, before it is used."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from moec.errors import CaptureError
from moec.interp import run
from moec.ir.graph import Graph
from moec.ir.types import DTYPES

SIZES = {3: ((1, 1), (2, 3), (1, 33), (3, 17)), 2: ((1,), (6,), (33,), (51,))}
# As many equal tokens, which all go to the same experts: a capacity shows only where it is
# exceeded.
EQUAL = {3: (1, 257), 2: (257,)}
SCALES = (1.0, 30.0)  # limits such as clamps show only far from zero
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}


def compare(
    module: nn.Module,
    graph: Graph,
    weights: Sequence[str],
    hidden: int,
    dtype: torch.dtype,
    rank: int,
) -> None:
    """Raise :class:`CaptureError` unless interpreting ``graph`` gives what ``module`` gives, at
    several sizes and scales.

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
        for leading in SIZES[rank]:
            for scale in SCALES:
                x = (torch.randn(*leading, hidden, generator=generator) * scale).to(device, dtype)
                _compare_once(module, graph, inputs, x)
        row = torch.randn(hidden, generator=generator).to(device, dtype)
        _compare_once(module, graph, inputs, row.expand(*EQUAL[rank], hidden).contiguous())


def compare_experts(module: nn.Module, graph: Graph, weights: Sequence[str], experts: int) -> None:
    """As :func:`compare` for experts called with tokens, indices and weights.

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
                data = _routed(graph, tokens, experts, scale, generator, device)
                _compare_call(module, graph, data, inputs)


def _routed(
    graph: Graph,
    tokens: int,
    experts: int,
    scale: float,
    generator: torch.Generator,
    device: torch.device,
) -> list[torch.Tensor]:
    """Tokens, indices and weights of one call; the largest number of tokens all goes one way."""
    x, idx, w = (v.type for v in graph.inputs[:3])
    hidden, choices = int(x.shape[-1]), int(idx.shape[-1])
    order = torch.rand(tokens, experts, generator=generator).argsort(-1)[:, :choices]
    if (tokens,) == EQUAL[2]:
        order = order[:1].expand(tokens, -1).contiguous()
    return [
        (torch.randn(tokens, hidden, generator=generator) * scale).to(device, DTYPES[x.dtype]),
        order.to(device),
        torch.rand(tokens, choices, generator=generator).to(device, DTYPES[w.dtype]),
    ]


def _compare_once(
    module: nn.Module, graph: Graph, inputs: list[torch.Tensor], x: torch.Tensor
) -> None:
    _compare_call(module, graph, [x], inputs)


def _compare_call(
    module: nn.Module, graph: Graph, data: list[torch.Tensor], inputs: list[torch.Tensor]
) -> None:
    x = data[0]
    expected = [t for t in tree_flatten(module(*data))[0] if isinstance(t, torch.Tensor)]
    flat = x.reshape(-1, x.shape[-1]) if graph.inputs[0].type.rank == 2 else x
    with torch.autocast(x.device.type, enabled=False):
        found = run(graph, [flat, *data[1:], *inputs])
    for ours, theirs in zip(found, expected, strict=True):
        if theirs.is_floating_point() and not theirs.isfinite().all():
            continue  # weights that nobody has set yet: nothing to compare
        error = _relative(ours, theirs)
        if not error <= _tolerance(theirs):
            raise CaptureError(
                f"the captured form differs from {type(module).__name__} on tokens of shape "
                f"{tuple(x.shape)} by {error:.1e}"
            )


def _tolerance(value: torch.Tensor) -> float:
    """What rounding may do: under autocast the products are taken in its dtype."""
    device = value.device.type
    dtypes = (value.dtype, autocast_dtype(device) or value.dtype)
    return max(TOLERANCE.get(dtype, 1e-4) for dtype in dtypes)


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
def unchanged(module: nn.Module) -> Iterator[None]:
    """Run a module's code for its result only: what it changes of itself is put back, then refused.

    Raises :class:`CaptureError` at the end if attributes or buffers were changed: a compiled call
    would not change them.
    """
    states = [_State(name, child) for name, child in module.named_modules()]
    device = next(module.parameters()).device
    forked = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    with forked, _without_hooks(module):
        try:
            yield
        finally:
            changed = [change for state in states for change in state.put_back()]
    if changed:
        raise CaptureError(
            f"forward changes {', '.join(changed[:3])} of the module, which a compiled call would "
            "not; return the value instead"
        )


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

    def put_back(self) -> list[str]:
        """Undo every change; returns the paths of what was changed."""
        changed = [*self._attributes(), *self._buffers()]
        return [f"{self.name}.{key}".lstrip(".") for key in changed]

    def _attributes(self) -> Iterator[str]:
        own = vars(self.module)
        for key in [k for k in own if k not in _REGISTRIES and k not in self.attributes]:
            del own[key]
            yield key
        for key, value in self.attributes.items():
            now, then = own.get(key, _MISSING), self.contents[key]
            if now is value and _contents(value) == then:
                continue
            own[key] = _refilled(value, then)
            if now is value or not _same_members(now, value):
                yield key

    def _buffers(self) -> Iterator[str]:
        for key, tensor, version, saved in self.buffers:
            replaced = self.module._buffers.get(key) is not tensor
            if replaced or tensor._version != version:
                self.module._buffers[key] = tensor
                with torch.no_grad():
                    tensor.copy_(saved)
                yield f"{key} (buffer)"


_REGISTRIES = set(vars(nn.Module()))
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
