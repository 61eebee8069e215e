"""Why rewrites were made, and why others nearly were: recorded while somebody listens.

A rule that finds most of its pattern and refuses says so with :func:`decline`; what was rewritten
comes with :func:`fired`. Both cost next to nothing otherwise: no text is made.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field

from moec.ir.graph import Op

# Why an op stays outside a kernel that is no near miss.
OWN_KERNEL = "it is a kernel of its own"


@dataclass(frozen=True)
class Note:
    """One thing that a rule did (``reason`` says what it became), or refused to do (and why).

    ``near`` is the op whose kernel ``op`` did not join.
    """

    rule: str
    op: Op
    reason: str
    near: Op | None = None


@dataclass
class Record:
    """What was noted so far."""

    fired: list[Note] = field(default_factory=list)
    declined: list[Note] = field(default_factory=list)
    rule: str = ""  # the rule that is about to fire, if it has a name of its own


_LISTENER: ContextVar[Record | None] = ContextVar("moec_reasons", default=None)


@contextlib.contextmanager
def listening() -> Iterator[Record]:
    """Record what the passes inside note."""
    record = Record()
    token = _LISTENER.set(record)
    try:
        yield record
    finally:
        _LISTENER.reset(token)


def is_listening() -> bool:
    """Whether anybody listens: what costs more than a call is asked for only then."""
    return _LISTENER.get() is not None


def decline(rule: str, op: Op, reason: str, *values: object, near: Op | None = None) -> None:
    """Note why a rule that nearly fitted an op does not; ``values`` fill the places ``{}``.

    It has no result, so a rule that may give anything can end with it.
    """
    record = _LISTENER.get()
    if record is not None:
        words = reason.format(*values) if values else reason
        record.declined.append(Note(rule, op, words, near))


def chose(rule: str) -> None:
    """Note the name of the rule whose result is about to replace an op."""
    record = _LISTENER.get()
    if record is not None:
        record.rule = rule


def fired(rule: str, op: Op, reason: str = "", *values: object) -> None:
    """Note that a rule replaced an op; a name from :func:`chose` goes before ``rule``."""
    record = _LISTENER.get()
    if record is not None:
        words = reason.format(*values) if values else reason
        record.fired.append(Note(record.rule or rule, op, words))
        record.rule = ""


__all__ = ["OWN_KERNEL", "Note", "Record", "chose", "decline", "fired", "is_listening", "listening"]
