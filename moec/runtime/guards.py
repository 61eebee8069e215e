"""What emitted modules check of the sizes of a call before they launch anything.

A check that holds is a comparison of two Python integers: some 50 ns.
"""

from __future__ import annotations

from moec.errors import CallError

# Programs that run at a time, at most: proofs about loops that take piece after piece rest on it.
MOST_PROCESSORS = 4096


def at_most(value: int, limit: int, text: str, asked: str) -> None:
    """Refuse sizes for which the module was not proved right.

    ``text`` is the expression that ``value`` is of, ``asked`` which op of the model asks for it.

    Raises:
        CallError: ``value`` is above ``limit``.
    """
    if value > limit:
        raise CallError(
            f"{asked}: {text} <= {limit} must hold, but {text} = {value}; call it with fewer tokens"
        )
