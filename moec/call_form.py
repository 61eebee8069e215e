"""The form of a block's call: the tokens, further tensors and plain values, by parameter."""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

_PLAIN = (bool, int, float, str, type(None), torch.dtype)
_MISSING = object()
MAX_FORMS = 8
MAX_FAILED_FORMS = 4


@dataclass(frozen=True)
class TensorForm:
    """A tensor besides the tokens.

    ``leading`` says what its first axes are: "tokens" (all leading axes of the tokens), "flat" (one
    axis of all tokens), "batch" (the tokens' first axis) or "none"; ``rest`` are the other sizes.
    """

    name: str
    dtype: torch.dtype
    leading: str
    rest: tuple[int, ...]

    def shape(self, lead: Sequence[int]) -> tuple[int, ...]:
        """The tensor's shape for tokens with these leading sizes."""
        first = {"tokens": tuple(lead), "flat": (math.prod(lead),), "batch": (lead[0],), "none": ()}
        return (*first[self.leading], *self.rest)

    def open_shape(self, lead: Sequence[Any]) -> tuple[Any, ...]:
        """The same with one axis for each of the tokens' where all of them are in it."""
        first = {"tokens": tuple(lead), "flat": tuple(lead), "batch": (lead[0],), "none": ()}
        return (*first[self.leading], *self.rest)


@dataclass(frozen=True)
class CallForm:
    """How a block is called: the parameter that takes the tokens (empty: the first one), further
    tensors, and the plain values that are not the parameter's default.
    """

    tokens: str = ""
    tensors: tuple[TensorForm, ...] = ()
    plain: tuple[tuple[str, Any], ...] = ()

    @property
    def is_tokens_alone(self) -> bool:
        """Whether the call has one argument: tokens."""
        return not self.tokens and not self.tensors and not self.plain

    def call(self, module: nn.Module, data: Sequence[torch.Tensor]) -> Any:
        """Call ``module`` with the tokens and the further tensors of ``data``."""
        named = dict(zip((t.name for t in self.tensors), data[1:], strict=True))
        named.update(self.plain)
        if self.tokens:
            return module(**{self.tokens: data[0]}, **named)
        return module(data[0], **named)


TOKENS_ALONE = CallForm()


@dataclass(frozen=True)
class Call:
    """The arguments of one call, sorted: tensors (tokens first) and plain values, by parameter."""

    names: tuple[str, ...]
    tensors: tuple[torch.Tensor, ...]
    plain: tuple[tuple[str, Any], ...]

    def forms(self) -> Iterator[CallForm]:
        """The forms that the call may have, likely ones first: equal sizes leave a choice."""
        x = self.tensors[0]
        further = zip(self.names[1:], self.tensors[1:], strict=True)
        choices = [list(_forms_of(n, t, x)) for n, t in further]
        for tensors in itertools.islice(itertools.product(*choices), MAX_FORMS):
            yield CallForm(self.names[0], tuple(tensors), self.plain)


def read_call(cls: type[nn.Module], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call | str:
    """Sort a call's arguments by the parameters of a class's forward.

    The tokens are the first floating-point tensor of rank 2 or more, the first tensor if none
    is. A sentence says why where an
    argument is neither a tensor nor a plain value, or has no name.
    """
    names, _ = parameters(cls)
    if len(args) > len(names):
        return f"it is called with {len(args)} arguments without names"
    given = dict(zip(names, args, strict=False))
    given.update((n, kwargs[n]) for n in names if n in kwargs)
    given.update((n, kwargs[n]) for n in sorted(kwargs.keys() - given.keys()))
    tensors = {n: v for n, v in given.items() if isinstance(v, torch.Tensor)}
    plain = {n: v for n, v in given.items() if n not in tensors}
    other = next((n for n, v in plain.items() if not is_plain(v)), None)
    if other is not None:
        kind = type(plain[other]).__name__
        return (
            f"its argument {other} ({kind}) is neither a tensor nor a plain value, so it is more "
            "than a MoE block"
        )
    if not tensors:
        return "it is called without tensors"
    floats = (n for n, v in tensors.items() if v.is_floating_point() and v.dim() > 1)
    tokens = next(floats, next(iter(tensors)))
    rest = [n for n in tensors if n != tokens]
    first = "" if names and tokens == names[0] else tokens
    ordered = (tensors[tokens], *(tensors[n] for n in rest))
    return Call((first, *rest), ordered, without_defaults(cls, plain))


def without_defaults(cls: type[nn.Module], plain: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """The plain values that are not what the parameter is without them."""
    _, defaults = parameters(cls)
    return tuple((n, v) for n, v in plain.items() if not _same(defaults.get(n, _MISSING), v))


def parameters(cls: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The parameters of a module class's forward that can be given by place and by name, in order;
    and all defaults.
    """
    return _parameters(cls)


@functools.cache
def _parameters(cls: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    own = getattr(cls, "_moec_original", cls)
    parameters = list(inspect.signature(inspect.unwrap(own.forward)).parameters.values())[1:]
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    by_place = [p for p in named if p.kind is p.POSITIONAL_OR_KEYWORD]
    defaults = {p.name: p.default for p in named if p.default is not p.empty}
    return tuple(p.name for p in by_place), defaults


def is_plain(value: Any) -> bool:
    """Whether a capture can take a value as it is: a number, a text, ``None``, or a tuple of
    such.
    """
    if isinstance(value, tuple):
        return all(map(is_plain, value))
    return isinstance(value, _PLAIN)


def _same(default: Any, value: Any) -> bool:
    return default is value or (type(default) is type(value) and bool(default == value))


def _forms_of(name: str, tensor: torch.Tensor, x: torch.Tensor) -> Iterator[TensorForm]:
    lead, shape = tuple(x.shape[:-1]), tuple(tensor.shape)
    if shape[: len(lead)] == lead:
        yield TensorForm(name, tensor.dtype, "tokens", shape[len(lead) :])
    if len(lead) > 1 and shape[:1] == (math.prod(lead),):
        yield TensorForm(name, tensor.dtype, "flat", shape[1:])
    if len(lead) > 1 and shape[:1] == lead[:1]:
        yield TensorForm(name, tensor.dtype, "batch", shape[1:])
    yield TensorForm(name, tensor.dtype, "none", shape)


def graph_inputs(
    form: CallForm, ranks: Sequence[int], data: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """A call's tensors in the shapes that a graph's inputs of these ranks have.

    The graph has one axis for all tokens, or one for each of the tokens' leading axes.
    """
    lead = data[0].shape[:-1]
    fitted = [_fitted(data[0], ranks[0], data[0].dim() - 1)]
    for wanted, tensor, rank in zip(form.tensors, data[1:], ranks[1:], strict=False):
        opened = tensor.reshape(wanted.open_shape(lead)) if wanted.leading == "flat" else tensor
        fitted.append(_fitted(opened, rank, opened.dim() - len(wanted.rest)))
    return fitted


def flattened(tensor: torch.Tensor, rank: int) -> torch.Tensor:
    """A tensor with its leading axes as one, so that it has a rank."""
    return tensor if tensor.dim() <= rank else tensor.flatten(0, tensor.dim() - rank)


def _fitted(tensor: torch.Tensor, rank: int, leading: int) -> torch.Tensor:
    return tensor if tensor.dim() == rank else tensor.flatten(0, leading - 1)


__all__ = [
    "MAX_FAILED_FORMS",
    "MAX_FORMS",
    "TOKENS_ALONE",
    "Call",
    "CallForm",
    "TensorForm",
    "flattened",
    "graph_inputs",
    "is_plain",
    "parameters",
    "read_call",
    "without_defaults",
]
