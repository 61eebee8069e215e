"""IR text as tokens, one at a time, with their places; every limit on what a file may hold that is
not one of dims.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NoReturn

from moec.errors import ParseError
from moec.ir.graph import Location
from moec.printable import printable

MAX_BYTES = 16 << 20
# An integer, a float, a name and a string may be so long; a message and a line shown with it, too.
MAX_DIGITS, MAX_FLOAT, MAX_WORD, MAX_STRING, MAX_MESSAGE, MAX_LINE = 30, 64, 256, 4096, 600, 200
_TOKEN = re.compile(
    r"""(?P<space>[ \t\r\n]+)|(?P<comment>//[^\n]*)
    |(?P<value>%[A-Za-z_][A-Za-z_0-9]*)|(?P<at>@[A-Za-z_][A-Za-z_0-9]*)
    |(?P<string>"(?:[^"\\\n]|\\.)*")|(?P<float>-?(?:\d+\.\d*(?:e[+-]?\d+)?|\d+e[+-]?\d+|inf\b|nan\b))|(?P<int>\d+)
    |(?P<word>[A-Za-z_][A-Za-z_0-9]*(?:\.[A-Za-z_0-9]+)*)|(?P<mark><=|[-+*^(){}\[\],:;=])""",
    re.VERBOSE | re.ASCII,  # a digit of another script is no digit here
)
_LIMITS = {
    "int": (MAX_DIGITS, "an integer", "digits"),
    "float": (MAX_FLOAT, "a number", "characters"),
    "string": (MAX_STRING, "a string", "characters"),
    "value": (MAX_WORD, "a name", "characters"),
    "at": (MAX_WORD, "a name", "characters"),
    "word": (MAX_WORD, "a word", "characters"),
}
_LINE = re.compile(r":(?P<line>\d{1,9})(?:(?P<end>\Z)|\s+\()", re.ASCII)


@dataclass(frozen=True, slots=True)
class Token:
    """A piece of the text and where it starts; ``line`` counts from 0."""

    kind: str
    text: str
    offset: int
    line: int


class Lexer:
    """Cuts a text in tokens; ``token`` is the one that is read next.

    ``places`` maps lines to the places that comments in them name, as far as the text was read.
    """

    def __init__(self, text: str, filename: str) -> None:
        self.text, self.filename = text, filename
        self.places: dict[int, Location] = {}
        self._offset = self._line = 0
        if len(text) > MAX_BYTES:
            self.fail(f"more than {MAX_BYTES >> 20} MiB of text", 0)
        self.token = self._read()

    def next(self) -> Token:
        """The current token; the one after it becomes current."""
        token = self.token
        if token.kind != "end":
            self.token = self._read()
        return token

    def fail(self, message: str, offset: int | None = None) -> NoReturn:
        """Raise a :class:`ParseError` with the place, its line and a caret."""
        offset = self.token.offset if offset is None else offset
        line = self.text.count("\n", 0, offset) + 1
        start = self.text.rfind("\n", 0, offset) + 1
        end = self.text.find("\n", offset)
        source = self.text[start : end if end >= 0 else len(self.text)][:MAX_LINE]
        column = offset - start + 1
        cut = "" if len(message) <= MAX_MESSAGE else " ..."
        raise ParseError(
            f"{printable(self.filename)}:{line}:{column}: {message[:MAX_MESSAGE]}{cut}\n"
            f"  {printable(source)}\n  {' ' * min(column - 1, MAX_LINE)}^"
        )

    def _read(self) -> Token:
        """The next token that is neither space nor comment."""
        while self._offset < len(self.text):
            offset = self._offset
            match = _TOKEN.match(self.text, offset)
            if match is None:
                self.fail(f"unexpected character {self.text[offset]!r}", offset)
            kind, text = str(match.lastgroup), match.group()
            self._offset = match.end()
            if kind == "space":
                self._line += text.count("\n")
            elif kind == "comment":
                self._note_place(text)
            else:
                self._check_length(kind, text, offset)
                return Token(kind, text, offset, self._line)
        return Token("end", "end of text", len(self.text), self._line)

    def _check_length(self, kind: str, text: str, offset: int) -> None:
        limit, what, unit = _LIMITS.get(kind, (MAX_STRING, "", ""))
        if len(text) > limit:
            self.fail(f"{what} of more than {limit} {unit}", offset)

    def _note_place(self, comment: str) -> None:
        place = location_in(comment)
        if place is not None:
            self.places[self._line] = place


def location_in(comment: str) -> Location | None:
    """The place in a comment ``// file:line (module)``, if it is one; in linear time."""
    text = comment[2:].strip()
    for match in _LINE.finditer(text):
        ends = match["end"] is not None
        if match.start() > 0 and (ends or text.endswith(")")):
            module = "" if ends else text[match.end() : -1]
            return Location(text[: match.start()], int(match["line"]), module)
    return None
