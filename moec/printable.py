"""Text from files and models, made safe to show."""

from __future__ import annotations


def printable(text: str) -> str:
    """``text`` with "?" for every character that does more than stand in a line.

    Those end the line, move the cursor, turn the direction of reading or cannot be encoded: in a
    comment of emitted code a line end would begin code, on a terminal an escape would run.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)


__all__ = ["printable"]
