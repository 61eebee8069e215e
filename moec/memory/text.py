"""What graphs and models hold in memory, as text for people."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from moec.ir.dims import evaluate, show_dim
from moec.ir.graph import Op
from moec.memory.buffers import Buffer
from moec.memory.model import NOT_COUNTED, ModelMemory
from moec.memory.prediction import Peak, Prediction
from moec.observers import table
from moec.report.memory_text import size_text

# Tensors of a peak that are shown.
_SHOWN = 5


def prediction_text(
    found: Prediction, balanced: Prediction, tokens: Sequence[int], budget: int | None = None
) -> str:
    """The peaks of a graph as polynomials and at some numbers of tokens; what makes the largest.

    ``balanced`` is the same with balanced routing. With a ``budget`` in bytes, also the most tokens
    that fit into it. Dims but one must be fixed.
    """
    parts = {n: p for n, p in _parts(found).items() if p.moments}
    if not parts:
        return "allocates nothing"
    counts = _in_range(found, tokens)
    lines = [_routing(found, balanced, counts)]
    for name, peak in parts.items():
        lines += _pieces(name, peak)
    lines += ["", *_numbers(parts, counts), *_largest_tensors(found, counts[-1])]
    if budget is not None:
        most, end = found.step.largest(budget), found.step.span[1]
        lines += ["", f"{size_text(budget)} fit one block with {_most(most, end)}"]
    return "\n".join(lines)


def _in_range(found: Prediction, tokens: Sequence[int]) -> list[int]:
    """Numbers of tokens that the dim may have."""
    name = found.step.names[0] if found.step.names else ""
    low, high = found.graph.ranges.get(name, (0, None))
    return sorted({max(low, n if high is None else min(n, high)) for n in tokens})


def _parts(found: Prediction) -> dict[str, Peak]:
    """The peaks to show, by name."""
    if found.held is None or found.backward is None:
        return {"forward": found.forward}
    return {
        "held between": found.held,
        "forward": found.forward,
        "backward": found.backward,
        "step": found.step,
    }


def _routing(worst: Prediction, balanced: Prediction, tokens: Sequence[int]) -> str:
    """How much less balanced routing needs."""
    if worst.target == "triton":
        return "routing: every buffer has room for the worst, so balanced and worst are the same"
    count, sizes = tokens[-1], dict.fromkeys(worst.step.names, tokens[-1])
    less = worst.step.at(**sizes) - balanced.step.at(**sizes)
    if not less:
        return "routing: no buffer depends on it, so balanced and worst are the same"
    return (
        "routing: the worst, as many rows as can be with one expert; balanced it is"
        f" {size_text(less)} less at {count} tokens"
    )


def _pieces(name: str, peak: Peak) -> list[str]:
    """Each polynomial, where it holds, and what runs there."""
    lines = []
    for piece in peak.pieces:
        op = piece.moment.op
        place = f"  at {_named(op)}" if op is not None and name != "held between" else ""
        dim = peak.names[0] if peak.names else ""
        reach = f"  {dim} <= {piece.high}" if piece is not peak.pieces[-1] else ""
        head = f"{name}:" if piece is peak.pieces[0] else " " * (len(name) + 1)
        lines.append(f"{head} {show_dim(piece.expression)} bytes{reach}{place}")
    return lines


def _named(op: Op) -> str:
    """An op by what it makes, and its place in the model."""
    made = ", ".join(f"%{v.hint}" for v in op.results)
    place = f"  // {op.loc}" if op.loc is not None else ""
    return f"{made} = {op.kind}{place}"


def _numbers(parts: Mapping[str, Peak], tokens: Sequence[int]) -> list[str]:
    """The peaks at some numbers of tokens."""
    name = next((p.names[0] for p in parts.values() if p.names), "T")
    heads = ("", *(f"{name} = {count}" for count in tokens))
    rows = [
        (n, *(size_text(p.at(**dict.fromkeys(p.names, count))) for count in tokens))
        for n, p in parts.items()
    ]
    return table(heads, rows).split("\n")


def _largest_tensors(found: Prediction, count: int) -> list[str]:
    """The largest tensors at the peak of the step."""
    peak = found.step
    sizes = {**peak.fixed, **dict.fromkeys(peak.names, count)}
    moment = peak.moment_at(**sizes)
    live = sorted(moment.live, key=lambda b: (-evaluate(b.bytes, sizes), b.name))
    rows = [(b.name, str(b.type), size_text(evaluate(b.bytes, sizes))) for b in live[:_SHOWN]]
    notes = [_note(found, b) for b in live[:_SHOWN]]
    rest = [evaluate(b.bytes, sizes) for b in live[_SHOWN:]]
    if rest:
        total = sum(rest) + evaluate(moment.scratch, sizes)
        rows.append((f"{len(rest)} others", "", size_text(total)))
        notes.append("")
    where = "".join(f", {n} = {s}" for n, s in sizes.items())
    part = "backward" if moment.is_backward else "forward"
    shown = table(("tensor", "type", "size"), rows).split("\n")[1:]
    lines = (f"  {a}  {b}".rstrip() for a, b in zip(shown, notes, strict=True))
    return ["", f"at the peak{where}, in the {part} pass:", *lines]


def _note(found: Prediction, buffer: Buffer) -> str:
    """What a buffer is to the caller, and where the model makes it."""
    place = buffer.op.loc if buffer.op is not None else None
    role = found.roles.get(buffer, "")
    return "  ".join(filter(None, [role, f"// {place}" if place is not None else ""]))


def _most(count: int | None, end: int) -> str:
    if count is None:
        return "no token"
    return f"up to {count} tokens" + (", the end of their range" if count == end else "")


def model_text(memory: ModelMemory, tokens: Sequence[int], budget: int | None = None) -> str:
    """A model's memory at some numbers of tokens, and what fits into a budget."""
    tokens = sorted({min(count, memory.most_tokens) for count in tokens})
    rows: dict[str, Callable[[int], int]] = {"parameters": lambda _: memory.parameters}
    if memory.is_training:
        rows["their gradients"] = lambda _: memory.gradients
        rows["held by the blocks"] = memory.held_at
    rows |= {"while a block runs": memory.transient_at, "all": memory.at}
    body = [(n, *(size_text(at(count)) for count in tokens)) for n, at in rows.items()]
    count = sum(p.count for p in memory.parts)
    lines = [f"the model: {count} block{'s' if count > 1 else ''}"]
    lines += [table(("", *(f"T = {n}" for n in tokens)), body), "", f"not counted: {NOT_COUNTED}"]
    if budget is not None:
        most = _most(memory.largest(budget), memory.most_tokens)
        lines.append(f"{size_text(budget)} fit the model with {most}")
    return "\n".join(lines)


__all__ = ["model_text", "prediction_text"]
