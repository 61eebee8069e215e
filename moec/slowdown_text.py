"""What was measured of a graph's time, as text for people: tables, then who is to blame."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from moec.bisect import GuiltyPass
from moec.bisect_text import op_lines, rewrite_lines
from moec.observers import Row, table
from moec.slowdown import Against, OpTime, PassTime, Slowdown, place_of

# Ops of the emitted module that are shown; the others are summed.
_SHOWN = 12


def slowdown_text(found: Slowdown, heading: str) -> str:
    """Where the time goes, what each pass did to it, and the guilty one."""
    parts = [heading, "", f"where {found.ms:.3f} ms go, by op of the emitted module"]
    parts.append(_ops_table(found.ops))
    if found.passes:
        parts += ["", "what each pass did to the time", _passes_table(found)]
    return "\n".join([*parts, "", *_verdict(found)])


def _ops_table(times: Sequence[OpTime]) -> str:
    heads = ("op", "ms", "share", "GB/s", "GFLOP/s")
    total = sum(t.ms for t in times) or 1.0
    by_time = sorted(times, key=lambda t: -t.ms)
    rows = [_op_row(t, total) for t in by_time[:_SHOWN]]
    notes = [f"{place_of(t.op)}{', backward' if t.is_backward else ''}" for t in by_time[:_SHOWN]]
    rest = by_time[_SHOWN:]
    if rest:
        took = sum(t.ms for t in rest)
        rows.append((f"{len(rest)} others", f"{took:.3f}", f"{took / total:.0%}", "", ""))
    return _noted(heads, rows, ["from", *notes])


def _op_row(time: OpTime, total: float) -> Row:
    seconds = max(time.ms, 1e-6) / 1e3
    return (
        f"{time.op.kind} %{time.op.results[0].hint}",
        f"{time.ms:.3f}",
        f"{time.ms / total:.0%}",
        f"{time.bytes / seconds / 1e9:.1f}",
        f"{time.flops / seconds / 1e9:.1f}" if time.flops else "",
    )


def _noted(heads: Row, rows: Sequence[Row], notes: Sequence[str]) -> str:
    """A table with words at the end of its lines."""
    lines = table(heads, rows).split("\n")
    width = max(map(len, lines))
    pairs = zip_longest(lines, notes, fillvalue="")
    return "\n".join(f"  {line.ljust(width)}  {note}".rstrip() for line, note in pairs)


def _passes_table(found: Slowdown) -> str:
    heads = ("pass", "ms before", "ms after", "change", "noise")
    guilty = -1 if found.guilty is None else found.guilty.index
    notes = [p.reason or ("<- slower" if p.index == guilty else "") for p in found.passes]
    return _noted(heads, [_pass_row(p) for p in found.passes], ["", *notes])


def _pass_row(time: PassTime) -> Row:
    name, c = f"{time.index + 1:02} {time.call}", time.change
    if c is None:
        return (name, "", "", "", "")
    return (name, f"{c.before:.3f}", f"{c.after:.3f}", f"{c.ratio:+.1%}", f"{c.noise:.1%}")


def _verdict(found: Slowdown) -> list[str]:
    if found.guilty is not None:
        return _guilty_lines(found.guilty)
    lines = []
    for kernel in found.kernels:
        c = kernel.change
        lines.append(
            f"a kernel is slower than its body, by {c.increase:.3f} ms: "
            f"{op_lines(found.graph, [kernel.op])[0]}"
        )
        lines.append(f"  with its body in its place {c.before:.3f} ms, with it {c.after:.3f} ms")
    if lines:
        return lines
    slowest = max(found.ops, key=lambda t: t.ms, default=None)
    words = "no pass made it slower, and no kernel is slower than its body"
    if slowest is None:
        return [words]
    return [words, f"  most of the time goes to {op_lines(found.graph, [slowest.op])[0]}"]


def _guilty_lines(guilty: GuiltyPass) -> list[str]:
    lines = [f"pass {guilty.index + 1} made it slower, {guilty.problem}: {guilty.call}"]
    if guilty.rewrite is None:
        return [*lines, "  as a whole: no single rewrite makes the difference"]
    return [*lines, *rewrite_lines(guilty.rewrite)]


def against_text(found: Against, heading: str) -> str:
    """A graph against a baseline: the whole, by line of the model, and the ops at the worst one."""
    c = found.change
    heads = ("from", "baseline ms", "now ms", "difference")
    rows = [
        (p.place, f"{p.before:.3f}", f"{p.after:.3f}", f"{p.after - p.before:+.3f}")
        for p in found.places
    ]
    lines = [heading, f"baseline -> now: {c}", "", table(heads, rows), ""]
    if not c.is_slower:
        return "\n".join([*lines, "not slower than the baseline beyond noise"])
    worst = found.places[0].place
    lines.append(f"slower at {worst}:")
    for sign, graph, times in (
        ("-", found.baseline, found.before),
        ("+", found.graph, found.after),
    ):
        here = [t for t in times if place_of(t.op) == worst]
        texts = op_lines(graph, [t.op for t in here])
        lines += [f"  {sign} {t.ms:.3f} ms  {text}" for t, text in zip(here, texts, strict=True)]
    return "\n".join(lines)


__all__ = ["against_text", "slowdown_text"]
