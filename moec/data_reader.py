"""Data of a file that was read as JSON, piece by piece, with the place where it is wrong."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Any, NoReturn

from moec.errors import ParseError

MOST_WORD, MOST_WHOLE = 200, 1 << 40


@dataclass(frozen=True)
class DataReader:
    """A piece of a file's data, and where it stands in the text."""

    name: str
    text: str
    place: int
    value: Any

    def fail(self, words: str) -> NoReturn:
        """Raise with line and column."""
        line = self.text.count("\n", 0, self.place) + 1
        column = self.place - self.text.rfind("\n", 0, self.place)
        raise ParseError(f"{self.name}:{line}:{column}: {words}")

    def mapping(self, what: str) -> dict[str, Any]:
        """The piece, which is an object."""
        if not isinstance(self.value, dict):
            self.fail(f"{what} is no object")
        return self.value

    def word(self, data: dict[str, Any], key: str) -> str:
        """A short text."""
        value = data.get(key)
        if not isinstance(value, str) or len(value) > MOST_WORD:
            self.fail(f"{json.dumps(key)[:80]} is no short text")
        return value

    def words(self, data: dict[str, Any], key: str) -> dict[str, str]:
        """An object of short texts."""
        found = data.get(key)
        if not isinstance(found, dict):
            self.fail(f'"{key}" is no object')
        return {str(k): self.word(found, k) for k in found}

    def wholes(self, data: dict[str, Any], key: str, *counts: int) -> list[int]:
        """A list of so many whole numbers, or so many."""
        value = data.get(key)
        if not isinstance(value, list) or len(value) not in counts:
            self.fail(f'"{key}" is no list of {" or ".join(map(str, counts))} numbers')
        return [self.whole(v, key) for v in value]

    def whole(self, value: Any, key: str) -> int:
        """A whole number that is not negative."""
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MOST_WHOLE:
            self.fail(f'"{key}" is no whole number from 0 to 2^40')
        return value

    def number(self, data: dict[str, Any], key: str, what: str = "time") -> float:
        """A finite number that is not negative."""
        value = data.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.fail(f'"{key}" is no {what}')
        if not 0 <= value <= sys.float_info.max:  # so are NaN and integers beyond all floats
            self.fail(f'"{key}" is no {what}')
        return float(value)


__all__ = ["DataReader"]
