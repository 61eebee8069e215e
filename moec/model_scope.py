"""Model scope: the whole model as one graph, with the compiled regions as ops in it.

Dynamo captures the forward; what is not MoE goes to the backend of the caller's choice. Where the
whole cannot be captured, the model's own code runs around the compiled regions, as in region scope.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo.exc import TorchDynamoException
from torch.utils import _pytree as pytree

from moec.causal_masks import with_causal_attention
from moec.errors import CompileError
from moec.session import Session
from moec.surroundings import is_traced, is_transformed

DEFAULT_BACKEND = "inductor"


class ModelScope:
    """What a whole model asks at each call; takes the place of a region on its root module.

    ``reason`` says why the model runs in region scope after all; it is empty as long as the whole
    graph serves it. ``served`` counts the calls that the whole graph answered.
    """

    kind = "model"

    def __init__(self, session: Session, name: str, backend: str) -> None:
        self.session, self.name, self.backend = session, name, backend
        self.reason, self.served = "", 0
        self.check = None if session.limits is None else session.limits.check
        self._compiled: Any = None

    def bound_to(self, module: nn.Module) -> ModelScope:
        """The same for a copy of the model: it is captured again, over the copy's weights."""
        return ModelScope(self.session, self.name, self.backend)

    def call(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The result from the whole graph, or ``NotImplemented`` if there is none."""
        if self.reason or is_traced() or is_transformed():
            return NotImplemented
        try:
            with traced_once(pytree.tree_leaves((args, kwargs))):
                result = self._whole(module)(module, *args, **kwargs)
        except TorchDynamoException as error:
            return self._in_region_scope(module, args, kwargs, error)
        self.served += 1
        return result

    def lines(self) -> list[str]:
        """What :func:`moec.explain` says about it."""
        if self.reason:
            return [f"  scope: region, the whole graph could not be captured: {self.reason}"]
        state = f"{self.served} calls" if self.served else "at the first call"
        return [f"  scope: model, one graph through {self.backend} ({state})"]

    def settle(self, module: nn.Module) -> None:
        """Nothing: what the model's own code changes on the way is its own."""

    def _whole(self, module: nn.Module) -> Any:
        if self._compiled is None:
            self._compiled = torch.compile(
                self._forward(module), fullgraph=True, dynamic=True, backend=self._compile
            )
        return self._compiled

    def _compile(self, module: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        compiler: Any = torch._dynamo.lookup_backend(self.backend)
        return compiler(with_causal_attention(module), inputs)

    def _forward(self, module: nn.Module) -> Any:
        """The model's own code, and before it what the tracer may know of the inputs' sizes."""
        forward = original(module).forward
        check = self.check
        if check is None:
            return forward

        def declared_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            check.tell_tracer(args, kwargs)
            return forward(module, *args, **kwargs)

        return declared_forward

    def _in_region_scope(
        self,
        module: nn.Module,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        error: TorchDynamoException,
    ) -> Any:
        """The model's own code around the regions, from now on; a call that it refuses too says
        nothing about the capture.
        """
        result = original(module).forward(module, *args, **kwargs)
        self.reason = first_line(error)
        self.session.warn(
            f"moec: {self.name} runs in region scope, its whole graph could not be captured: "
            f"{self.reason}"
        )
        return result


def original(module: Any) -> Any:
    """The class that a module had before it was compiled."""
    return type(module)._moec_original


def first_line(error: Exception) -> str:
    """What an error of the tracer says, without its advice for torch's developers."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)


@contextlib.contextmanager
def traced_once(arguments: Sequence[object] = ()) -> Iterator[None]:
    """Settings of the tracer with which a model has one graph, and is traced for it once.

    More graphs than Dynamo's default are allowed: batch 1 and length 1 have graphs of their own.
    What a model tells a logger on the way is left out: a message is no reason not to have one
    graph. Python's floats are constants unless ``arguments``, those of the call, have one: else the
    tracer compiles the whole model, finds that they are constants (the eps of a norm, the scale of
    attention) and does it all once more.
    """
    changes: dict[str, Any] = {
        "recompile_limit": 16,
        "accumulated_recompile_limit": 256,
        "specialize_float": not any(isinstance(a, float) for a in arguments),
        "ignore_logger_methods": _Functions(
            torch._dynamo.config.ignore_logger_methods | _logging_methods()
        ),
    }
    with torch._dynamo.config.patch(changes):
        yield


class _Functions(set[Any]):
    """Functions, of which iteration gives the names: torch 2.11 sorts and writes what its settings
    hold, for its metrics, and logs a traceback where it cannot.
    """

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(repr(function) for function in set.__iter__(self)))


def _logging_methods() -> set[Any]:
    """What loggers are told by; libraries add methods of their own, as ``warning_once``."""
    usual = ("debug", "info", "warning", "error")
    return {m for name, m in vars(logging.Logger).items() if name.removesuffix("_once") in usual}


def check_backend(backend: Any) -> str:
    """The name of a backend that torch.compile knows."""
    known = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        raise CompileError(
            f"option 'model_backend': torch.compile knows no backend {backend!r}; "
            f"it knows {', '.join(sorted(known))}"
        )
    return str(backend)


__all__ = ["DEFAULT_BACKEND", "ModelScope", "check_backend", "first_line", "traced_once"]
