"""The errors that moec raises on purpose. Each message says what, where, and what to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


class MoecError(Exception):
    """Base of all errors that moec raises on purpose; the command line prints them without a
    traceback.
    """


class DimError(MoecError):
    """A size that is malformed, unbound or outside its range."""


class IRError(MoecError):
    """A graph that breaks a rule of the IR: the message names the op and its source line."""


class ParseError(MoecError):
    """Text that is no IR: ``file:line:column: message`` and a caret under the place."""


class CaptureError(MoecError):
    """A part of a model that moec could not read; the part then stays as it was."""


class NotRunError(CaptureError):
    """A module whose own code raised on the tokens that it was tried with."""


class PassError(MoecError):
    """A pass that failed or does not exist, or an option that it does not have."""


class MeaningError(PassError):
    """A pass that changed what a graph computes: at ``sizes``, on the inputs of ``seed``."""

    def __init__(self, message: str, sizes: Mapping[str, int], seed: int) -> None:
        super().__init__(message)
        self.sizes, self.seed = dict(sizes), seed


class CodegenError(MoecError):
    """A kernel op that a target cannot emit."""


class InvarianceError(CodegenError):
    """Code in which a token's bits would depend on the other tokens, where that was ruled out."""


class CompileError(MoecError):
    """A model, option or target that :func:`moec.compile` cannot take."""


class CallError(MoecError):
    """Wrong inputs to a compiled region: dtype, shape or device."""


class PlanError(MoecError):
    """A planning problem or a schedule that is malformed, or a budget that no plan meets."""


class BudgetError(PlanError):
    """No plan within the budget was found, or there is none.

    ``least_known``: the least budget in bytes for which a plan is known, ``sequence`` that plan;
    ``least_possible``: no plan needs less.
    """

    def __init__(
        self, message: str, least_known: int, least_possible: int, sequence: Sequence[int] = ()
    ) -> None:
        super().__init__(message)
        self.least_known = least_known
        self.least_possible = least_possible
        self.sequence = tuple(sequence)
