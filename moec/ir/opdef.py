"""Declaring ops: one class a kind, with everything that is known about it.

``infer(*types, **attrs)`` gives the result types; ``eval(*tensors, **attrs)`` is the meaning in
plain PyTorch; ``vjp(b, op, *cotangents)`` (optional) builds the gradients of the operands;
``cost(op)`` (optional) gives bytes moved and floating-point operations as dims; ``attrs`` names the
attributes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moec.errors import IRError

DIALECTS = ("t", "moe", "kern")


@dataclass(frozen=True)
class OpDef:
    """The declaration of one op kind."""

    kind: str
    doc: str
    infer: Callable[..., Any]
    eval: Callable[..., Any]
    vjp: Callable[..., Any] | None = None
    cost: Callable[..., Any] | None = None
    has_body: bool = False
    pointwise: bool = False
    attrs: Mapping[str, str] = field(default_factory=dict)  # name -> type, as written in infer
    required: frozenset[str] = field(default_factory=frozenset)

    @property
    def dialect(self) -> str:
        """The part of the kind before the dot."""
        return self.kind.split(".", 1)[0]


_OPS: dict[str, OpDef] = {}


def defop(kind: str, *, has_body: bool = False, pointwise: bool = False) -> Callable[[type], type]:
    """Class decorator that declares an op; its docstring becomes its entry in ``docs/ops.md``."""

    def register(cls: type) -> type:
        if kind in _OPS or kind.split(".", 1)[0] not in DIALECTS:
            raise IRError(
                f"op {kind!r} is declared twice or has no known dialect ({', '.join(DIALECTS)})"
            )
        declared: Any = cls
        parameters = inspect.signature(declared.infer).parameters.values()
        keywords = [p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "body"]
        _OPS[kind] = OpDef(
            kind,
            inspect.cleandoc(cls.__doc__ or ""),
            declared.infer,
            declared.eval,
            getattr(cls, "vjp", None),
            getattr(cls, "cost", None),
            has_body,
            pointwise,
            {p.name: str(p.annotation) for p in keywords},
            frozenset(p.name for p in keywords if p.default is p.empty),
        )
        return cls

    return register


def opdef(kind: str) -> OpDef:
    """The declaration of a kind; an :class:`IRError` that lists near names if there is none."""
    load_dialects()
    if kind not in _OPS:
        near = sorted(k for k in _OPS if kind.split(".")[-1][:4] in k)[:6]
        raise IRError(
            f"unknown op {kind!r}" + (f"; did you mean {', '.join(near)}?" if near else "")
        )
    return _OPS[kind]


def all_ops() -> dict[str, OpDef]:
    """Every declared op by kind, sorted."""
    load_dialects()
    return dict(sorted(_OPS.items()))


def load_dialects() -> None:
    """Import the modules that declare the ops (they need this module, so not at the top)."""
    import moec.ops.backward
    import moec.ops.indexing
    import moec.ops.integer
    import moec.ops.kernel
    import moec.ops.moe
    import moec.ops.one_group
    import moec.ops.picks
    import moec.ops.pointwise
    import moec.ops.rows
    import moec.ops.tensor
    import moec.ops.token_rounding  # noqa: F401
