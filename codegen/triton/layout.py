"""Breaking long lines of emitted code at brackets, as a formatter would."""

from __future__ import annotations

WIDTH = 100
_OPEN, _CLOSE = "([{", ")]}"


def wrapped(text: str, width: int) -> list[str]:
    """A line of code as lines of at most ``width`` where brackets allow it."""
    if len(text) <= width or text.lstrip().startswith(("#", '"')):
        return [text]
    group = _longest_group(text)
    if group is None:
        return [text]
    first, last = group
    inner = text[first + 1 : last].strip().rstrip(",")
    body = [inner] if len(inner) + 4 <= width else _items(inner, width)
    lines = [text[: first + 1], *(f"    {line}" for line in body)]
    return [*lines, *wrapped(text[last:], width)]


def _items(inner: str, width: int) -> list[str]:
    """The parts of a list, as many on a line as fit, each part wrapped if it must be."""
    lines, current = [], ""
    for item in split_items(inner):
        if current and len(current) + len(item) + 6 > width:
            lines.append(current.rstrip())
            current = ""
        if len(item) + 5 > width:
            *head, current = wrapped(item, width - 4)
            lines += head
            current += ", "
        else:
            current += f"{item}, "
    return [*lines, current.rstrip()]


def split_items(text: str) -> list[str]:
    """The parts between commas that no bracket encloses."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in _OPEN) - (c in _CLOSE)
        if c == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    return [p for p in (*parts, text[start:].strip()) if p]


def _longest_group(text: str) -> tuple[int, int] | None:
    """The call with the most between its brackets."""
    found, depth, start = None, 0, 0
    for i, c in enumerate(text):
        if c in _OPEN:
            start = i if depth == 0 else start
            depth += 1
        elif c in _CLOSE:
            depth -= 1
            before = text[start - 1 : start]  # a bracket that only groups must not get a comma
            call = (
                text[start] == "(" and depth == 0 and (before.isalnum() or before in tuple("_])"))
            )
            if call and (found is None or i - start > found[1] - found[0]):
                found = start, i
    return found
