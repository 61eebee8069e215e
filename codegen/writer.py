"""Writing indented Python source."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class Writer:
    """Collects lines at the current indentation."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._depth = 0

    def line(self, text: str = "") -> None:
        """One line (or several, if ``text`` has line breaks)."""
        for part in text.split("\n"):
            self._lines.append("    " * self._depth + part if part else "")

    def lines(self, *texts: str) -> None:
        """Several lines."""
        for text in texts:
            self.line(text)

    @contextlib.contextmanager
    def block(self, head: str) -> Iterator[None]:
        """``head`` and an indented block below it."""
        self.line(head)
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1

    def text(self) -> str:
        """Everything written."""
        return "\n".join(self._lines) + "\n"
