"""What passes did to a graph and nearly did, and what a kernel is: fusion, template, tile, cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from moec import reasons
from moec.cost import Cost, op_cost
from moec.errors import CodegenError
from moec.ir.dims import Dim, evaluate, symbols
from moec.ir.graph import Graph, Op
from moec.ir.text import Names, show_attribute, show_op
from moec.manager import PassCall, PassManager, Step
from moec.observers import Observer, summary
from moec.reasons import OWN_KERNEL, Note, Record

# What notes about the choice of template and tile are called.
_CHOICES = {"tile", "template", "template tma"}
# Numbers of tokens at which bytes and operations are printed.
_TOKENS = (1, 4096)


@dataclass(frozen=True)
class PassReport:
    """One pass over one graph: the step, the rules that fired and those that nearly did."""

    step: Step
    number: int
    fired: tuple[Note, ...]
    declined: tuple[Note, ...]

    def __str__(self) -> str:
        state = summary(self.step) if self.step.changed else "changed nothing"
        lines = [f"{self.number:02} {self.step.call}: {state}"]
        lines += _section("fired", self.fired)
        lines += _section("nearly fired", [n for n in self.declined if n.reason != OWN_KERNEL])
        return "\n".join(lines)


def _section(head: str, notes: Sequence[Note]) -> list[str]:
    if not notes:
        return []
    lines = [f"  {head}:"]
    for note in notes:
        lines.append(f"    {note.rule}: {_line(note.op)}")
        if note.near is not None:
            lines.append(f"      into the kernel of %{note.near.results[0].hint}: {note.reason}")
        elif note.reason:
            lines.append(f"      {note.reason}")
    return lines


def _line(op: Op) -> str:
    """An op in short, and the line of the model that it comes from."""
    results = ", ".join(f"%{v.hint}" for v in op.results)
    operands = ", ".join(f"%{v.hint}" for v in op.operands)
    place = f"  // {op.loc}" if op.loc is not None else ""
    return f"{results} = {op.kind}({operands}){place}"


class Explain(Observer):
    """Collects a :class:`PassReport` for each pass, from what its rules note in ``record``."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.reports: list[PassReport] = []

    def before(self, call: PassCall, graph: Graph, index: int) -> None:
        self.record.fired.clear()
        self.record.declined.clear()

    def after(self, step: Step, index: int) -> None:
        fired = tuple(self.record.fired)
        declined = _of_the_end(fired, self.record.declined)
        self.reports.append(PassReport(step, index + 1, fired, declined))


def _of_the_end(fired: Sequence[Note], declined: Sequence[Note]) -> tuple[Note, ...]:
    """What was declined for good: once each, and not where a later round fired after all."""
    done = {n.op.results[0] for n in fired if not _is_choice(n)}
    kept: dict[tuple[object, ...], Note] = {}
    for note in declined:
        if note.op.results[0] not in done:
            near = note.near.results[0] if note.near is not None else None
            kept[note.rule, note.op.results[0], near] = note
    return tuple(kept.values())


def _is_choice(note: Note) -> bool:
    """Whether a rule that fired still leaves others that did not."""
    return note.rule in _CHOICES or note.rule.startswith("fuse")


def explain_passes(graph: Graph, calls: str | Sequence[PassCall]) -> list[PassReport]:
    """Run passes over a graph and say of each what it did, what it nearly did, and why not.

    Raises what the passes raise.
    """
    with reasons.listening() as record:
        observer = Explain(record)
        PassManager(calls, [observer]).run(graph)
    return observer.reports


# kernels
@dataclass(frozen=True)
class KernelReport:
    """One kernel of a lowered graph: its name, its op, and what the passes noted about it."""

    name: str
    op: Op
    template: str
    notes: tuple[Note, ...]
    outside: tuple[Note, ...]
    ranges: Mapping[str, tuple[int, int | None]]

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.op.kind}{self._place()}", f"  {self.template}"]
        lines += [f"  {note.rule}: {note.reason}" for note in self.notes]
        lines += ["  computes, by line of the model:", *self._fused()]
        if self.outside:
            lines.append("  stayed outside:")
        for note in self.outside:
            lines += [f"    {_line(note.op)}", f"      {note.reason}"]
        return "\n".join([*lines, *self._cost()])

    def _place(self) -> str:
        return f"  // {self.op.loc}" if self.op.loc is not None else ""

    def _fused(self) -> Iterator[str]:
        body = self.op.body
        if body is None:
            return
        place, names = "", Names()
        for value in body.inputs:
            names.add(value)
        for op in body.ops:
            here = str(op.loc) if op.loc is not None else "(of no known line)"
            if here != place:
                place = here
                yield f"    {place}"
            yield f"      {show_op(op, names)}"

    def _cost(self) -> list[str]:
        cost = op_cost(self.op)
        lines = [f"  moves at most {cost.bytes} bytes", f"  computes {cost.flops} operations"]
        return lines + [f"    {text}" for text in cost_lines(cost, self.ranges)]


def cost_lines(cost: Cost, ranges: Mapping[str, tuple[int, int | None]]) -> list[str]:
    """Bytes, operations and operations a byte at a small and at a large number of tokens."""
    names = sorted(symbols(cost.bytes) | symbols(cost.flops))
    if not names:
        return [_cost_line("always", cost, {})]
    found = {}
    for size in _TOKENS:
        sizes = {name: _inside(size, ranges.get(name, (0, None))) for name in names}
        text = ", ".join(f"{name}={value}" for name, value in sizes.items())
        found[text] = _cost_line(f"at {text}", cost, sizes)
    return list(found.values())


def _inside(size: int, bounds: tuple[int, int | None]) -> int:
    low, high = bounds
    return max(low, size if high is None else min(size, high))


def _cost_line(head: str, cost: Cost, sizes: Mapping[str, int]) -> str:
    moved, work = _number(cost.bytes, sizes), _number(cost.flops, sizes)
    rate = f", {work / moved:.1f} operations a byte" if moved else ""
    return f"{head}: {_short(moved)}B, {_short(work)}FLOP{rate}"


def _number(dim: Dim, sizes: Mapping[str, int]) -> int:
    return int(evaluate(dim, sizes))


def _short(number: int) -> str:
    """A number with a unit: ``1.5 M``."""
    value, units = float(number), ["", "k", "M", "G", "T", "P"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.4g} {units[0]}"


def explain_kernels(
    graph: Graph, reports: Sequence[PassReport] = (), target: str = "triton"
) -> list[KernelReport]:
    """The kernels of a lowered graph, with what the passes that made it noted.

    Kernels of equal text share a name, as in the emitted module.
    """
    names, templates = _emitted(graph, target)
    fired = [n for r in reports for n in r.fired]
    declined = [n for r in reports for n in r.declined]
    found = []
    for op in graph.ops:
        if op.body is None:
            continue
        inside = {v for o in op.body.ops for v in o.results}
        notes = [n for n in (*fired, *declined) if _is_of(n, op) and n.rule in _CHOICES]
        outside = [
            n for n in declined if n.near is not None and n.near.results[0] in inside and n.reason
        ]
        outside = [n for n in outside if n.op.results[0] not in inside]
        found.append(
            KernelReport(
                names[op], op, templates[op], tuple(notes), tuple(outside), dict(graph.ranges)
            )
        )
    return found


def _is_of(note: Note, op: Op) -> bool:
    return note.op.results[0] is op.results[0]


def _emitted(graph: Graph, target: str) -> tuple[dict[Op, str], dict[Op, str]]:
    """The name of each kernel in the emitted module, and how it is generated."""
    from moec.codegen.labels import label

    kernels = [op for op in graph.ops if op.body is not None]
    if target == "aten":
        how = "PyTorch expressions, on blocks of rows that stay in the cache"
        return {op: label(op) for op in kernels}, dict.fromkeys(kernels, how)
    from moec.codegen.triton import TritonEmitter

    emitter = TritonEmitter(graph)
    names = {op: k.name for op, k in emitter.kernels.items()}
    names.update({op: label(op) for op in kernels if op not in names})
    return names, {op: _how(op, emitter.reasons.get(op)) for op in kernels}


def _how(op: Op, refusal: str | None) -> str:
    if refusal is not None:
        return f"no kernel, PyTorch expressions: {refusal}"
    template, tile = op.attrs.get("template"), op.attrs.get("tile")
    words = "" if template is None else f", template {template}"
    return f"a Triton kernel{words}" + ("" if tile is None else f", tile {show_attribute(tile)}")


def find_kernels(reports: Sequence[KernelReport], name: str) -> list[KernelReport]:
    """The kernels of a name, or whose name holds it.

    Raises:
        CodegenError: there is none.
    """
    found = [k for k in reports if k.name == name] or [k for k in reports if name in k.name]
    if not found:
        names = ", ".join(dict.fromkeys(k.name for k in reports)) or "none"
        raise CodegenError(f"no kernel {name!r}; the kernels: {names}")
    return found


__all__ = [
    "Explain",
    "KernelReport",
    "PassReport",
    "cost_lines",
    "explain_kernels",
    "explain_passes",
    "find_kernels",
]
