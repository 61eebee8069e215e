"""What a graph holds in memory, as tables for people."""

from __future__ import annotations

from collections.abc import Sequence

from moec.ir.dims import evaluate, show_dim
from moec.ir.graph import Op, Value, producers
from moec.ir.text import Names, show_op
from moec.observers import Row, table
from moec.report.memory import MemoryUse, expression

# Values of a list that are shown; the rest is summed.
_SHOWN = 10
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def memory_text(use: MemoryUse) -> str:
    """The peak and what lives there, what is held for the backward pass, what the caller holds."""
    return "\n".join([_heading(use), *_peak(use), *_held(use), *_outside(use)])


def size_text(count: float) -> str:
    """A number of bytes in the unit that people read it in."""
    unit = 0
    while count >= 1024 and unit < len(_UNITS) - 1:
        count, unit = count / 1024, unit + 1
    return (
        f"{count:.0f} {_UNITS[unit]}" if count >= 100 or not unit else f"{count:.1f} {_UNITS[unit]}"
    )


def _heading(use: MemoryUse) -> str:
    sizes = ", ".join(f"{n}={s}" for n, s in use.sizes.items())
    part = "forward and backward" if use.graph.cotangents else "forward"
    return f"@{use.graph.name}, {part}{', ' if sizes else ''}{sizes}"


def _peak(use: MemoryUse) -> list[str]:
    part = ", in the backward pass" if use.is_backward else ""
    count = len(use.graph.ops)
    return [
        "",
        f"peak: {size_text(use.peak)} = {show_dim(expression(use.alive))} bytes, at op "
        f"{use.place + 1} of {count}{part}",
        f"  {_line(use, use.op)}",
        *_table(use, use.alive),
    ]


def _held(use: MemoryUse) -> list[str]:
    if not use.graph.cotangents:
        return []
    size = size_text(use.bytes(use.held))
    total = f"{size} = {show_dim(expression(use.held))} bytes"
    return ["", f"held between forward and backward: {total}", *_table(use, use.held)]


def _outside(use: MemoryUse) -> list[str]:
    inputs = use.graph.inputs
    gradients = [g for g in use.graph.gradients if g is not None]
    lines = ["", f"inputs, not counted above: {size_text(use.bytes(inputs))}"]
    if gradients:
        lines.append(f"gradients returned, counted above: {size_text(use.bytes(gradients))}")
    return lines


def _table(use: MemoryUse, values: Sequence[Value]) -> list[str]:
    if not values:
        return ["  nothing"]
    names, made = _names(use), producers(use.graph)
    rows = [_row(use, names, v) for v in values[:_SHOWN]]
    rest = values[_SHOWN:]
    if rest:
        rows.append((f"{len(rest)} others", "", "", size_text(use.bytes(rest))))
    places = [made[v].loc for v in values[:_SHOWN]]
    notes = ["made at", *(str(p) if p is not None else "by a pass" for p in places)]
    lines = table(("value", "type", "bytes", "now"), rows).split("\n")
    width = max(map(len, lines))
    notes += [""] * (len(lines) - len(notes))
    return [f"  {a.ljust(width)}  {b}".rstrip() for a, b in zip(lines, notes, strict=True)]


def _row(use: MemoryUse, names: Names, value: Value) -> Row:
    size = evaluate(value.type.bytes, use.sizes)
    return (f"%{names[value]}", str(value.type), show_dim(value.type.bytes), size_text(size))


def _names(use: MemoryUse) -> Names:
    """The names that the graph's text gives its values."""
    names = Names()
    for value in (*use.graph.inputs, *use.graph.cotangents):
        names.add(value)
    for op in use.graph.ops:
        show_op(op, names)
    return names


def _line(use: MemoryUse, op: Op) -> str:
    names = Names()
    for value in (*use.graph.inputs, *use.graph.cotangents):
        names.add(value)
    texts = {o: show_op(o, names) for o in use.graph.ops}
    return f"{texts[op]}  // {op.loc}" if op.loc is not None else texts[op]


__all__ = ["memory_text", "size_text"]
