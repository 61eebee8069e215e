"""Routing: scores, selection and weights of a block of tokens a program; then rows by expert.

Three launches, none of which waits for the host: each block selects and counts, the counts are
scanned an expert at a time, and each block places its pairs. Where the scores are more than a
program can express, they are PyTorch expressions and only the placing is kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from moec.codegen.requirements import WORD
from moec.codegen.triton.context import Context, arguments, only_if, remarks, write
from moec.codegen.triton.facts import Facts
from moec.codegen.triton.kernel import KernelText, Unsupported, documentation
from moec.codegen.triton.scores import Scores, groups_of, tokens_a_program
from moec.codegen.triton.tiles import FEW_ROWS, power_of_two
from moec.codegen.writer import Writer
from moec.ir.dims import ceildiv, python_source
from moec.ir.graph import Graph, Op, Value

EmitInner = Callable[[Writer, Op, Context], None]
PAIRS = 128  # pairs that one program ranks
ONE_PROGRAM = "one program"  # the template for few tokens


def few_routing(op: Op) -> tuple[int, ...]:
    """The tile of a routing in one program: the most tokens."""
    inner = op.body.ops if op.body is not None else ()
    dispatch = next(o for o in inner if o.kind == "moe.dispatch")
    choices = int(dispatch.operands[0].type.shape[1])
    return (tokens_a_program(choices, int(dispatch.attrs["experts"])),)


def most_few_tokens(graph: Graph) -> int:
    """For how many tokens the templates for few tokens serve; 0 where they do not apply."""
    routings = [op for op in graph.ops if op.kind == "kern.routing"]
    return min((few_routing(op)[0] for op in routings), default=0)


@dataclass
class Routing:
    """The kernels of one ``kern.routing``; see the module."""

    op: Op
    name: str
    emit_inner: EmitInner
    facts: Facts = field(init=False)
    scores: Scores | None = field(init=False, default=None)
    reason: str = field(init=False, default="")

    def __post_init__(self) -> None:
        if self.op.body is None:
            raise Unsupported("no body")
        self.body = self.op.body
        found = [o for o in self.body.ops if o.kind == "moe.dispatch"]
        if len(found) != 1:
            raise Unsupported(f"{len(found)} dispatches")
        self.dispatch = found[0]
        self.experts = int(self.dispatch.attrs["experts"])
        self.choices = int(self.dispatch.operands[0].type.shape[1])
        self.facts = Facts.of(self.op)
        tokens, choices = self.dispatch.operands[0].type.shape
        if self.few:
            self.facts.limit(tokens, int(self.op.attrs["tile"][0]), "tokens of one program")
        self.facts.rows(tokens * choices)
        limits = [o for o in self.body.ops if o.kind == "moe.limit"]
        self.limit = limits[0] if limits else None
        if len(limits) > 1 or (limits and limits[0].result is not self.dispatch.operands[0]):
            raise Unsupported("a capacity of something else")
        self._try_scores()
        self._ask()

    def _try_scores(self) -> None:
        if all(op in (self.dispatch, self.limit) for op in self.body.ops):
            return
        try:
            tile = self.op.attrs.get("tile")
            self.scores = Scores(self.body, self.dispatch, tile, self.facts, self.few, self.limit)
        except Unsupported as error:
            self.reason = str(error)

    def _ask(self) -> None:
        """What counting and placing pairs needs where there are many."""
        if self.few:
            return
        pairs, lanes = self.dispatch.operands[0].type.elements, power_of_two(self._block)
        self.facts.word(pairs + lanes, "pairs are numbered in 32 bits")
        most = self._lanes * (ceildiv(pairs, self._block) + 1)
        if self.limit is not None:
            self.facts.word(self.limit.attrs["capacity"], "a capacity in 32 bits")
        self.facts.limit(most, WORD, "counts by expert and block in 32 bits")

    @property
    def few(self) -> bool:
        """Whether all of it is one program."""
        return bool(self.op.attrs.get("template") == ONE_PROGRAM)

    @property
    def library(self) -> set[str]:
        """The library functions in use."""
        if self.few:
            return {"place_few_pairs"} if self.scores is None else self.scores.text.used
        counting = "count_pairs" if self.limit is None else "count_choices"
        used = {counting} if self.scores is None else self.scores.text.used
        return used | {"scan_counts", "place_pairs" if self.limit is None else "place_limited"}

    @property
    def _buckets(self) -> int:
        """One more than experts where a pair may have none; one a group under a capacity."""
        if self.limit is not None:
            return self.experts * groups_of(self.limit, self.choices)
        return self.experts + 1 if self.scores is None else self.scores.buckets

    @property
    def _lanes(self) -> int:
        """For how many counts a program has lanes."""
        if self.limit is None:
            return power_of_two(self._buckets)
        return power_of_two(self.experts + 1) * power_of_two(groups_of(self.limit, self.choices))

    @property
    def _block(self) -> int:
        """Pairs a program."""
        return PAIRS if self.scores is None else self.scores.tokens * self.choices

    def define(self, writer: Writer) -> None:
        """Write the kernel of the scores."""
        if self.scores is not None:
            tile = f"tile: {self.scores.tokens} tokens x {self.experts} experts"
            self.scores.text.write(
                writer, self.name, documentation(self.op, [tile, *self.facts.limits])
            )

    # the host
    def launch(self, writer: Writer, context: Context) -> None:
        """Write the host lines."""
        context.contiguous(writer, self.op.operands)
        index = self._host_scores(writer, context) if self.scores is None else ""
        made = self._allocate(writer, context, index)
        if self.few:
            self._launch_one(writer, context, made)
            return
        pairs = python_source(self.dispatch.operands[0].type.elements)
        histogram, blocks = (context.names.fresh(n) for n in ("histogram", "blocks"))
        made["histogram"] = histogram
        block, padded = self._block, power_of_two(self._buckets)
        lists = self._row_lists(writer, context, made)
        remarks(writer, self.facts.limits)
        writer.line(f"{blocks} = triton.cdiv({pairs}, {block})")
        size = f"({self._buckets}, {blocks} + 1)"
        writer.line(f"{histogram} = torch.empty({size}, dtype=torch.int32, device=device)")
        with writer.block(f"if {only_if(self.dispatch.results[0].type.shape[0])}:"):
            self._launch_first(writer, context, made, pairs, blocks)
            writer.line(f"scan_counts[({self._buckets},)]({histogram}, {blocks}, CHUNK=1024)")
            inner = [made["index"], histogram, *(made[n] for n in _RESULTS)]
            if self.limit is not None:
                self._launch_limited(writer, blocks, [*inner, made["limited"], pairs, blocks])
            else:
                sizes = f"E={self.experts}, BUCKETS={self._buckets}, EP={padded}, BLOCK={block}"
                inner += [names for names, _ in lists.values()]
                inner += [pairs, blocks, sizes, f"PAIRS={power_of_two(block)}"]
                inner += [f"{kind}={rows}" for kind, (_, rows) in lists.items() if rows]
                write(writer, f"place_pairs[({blocks},)]({', '.join(inner)})")
        with writer.block("else:"):
            writer.line(f"{made['offsets']}.zero_()")
        writer.line(f"del {histogram}")

    def _row_lists(
        self, writer: Writer, context: Context, made: dict[str, str]
    ) -> dict[str, tuple[str, int]]:
        """Names and rows of the lists of row tiles that placing writes besides; 0 for none."""
        lists = {"TILES": (made["offsets"], 0), "PLACES": (made["offsets"], 0)}
        outer = dict(zip(self.body.outputs, self.op.results, strict=True))
        offsets, rows = outer.get(self.dispatch.results[1]), self.dispatch.results[0].type.shape[0]
        for wanted in context.wanted if self.limit is None else ():
            kind = "PLACES" if wanted.has_ends else "TILES"
            if wanted.offsets is offsets and not lists[kind][1]:
                lists[kind] = context.room_for(writer, wanted, rows), wanted.rows
        return lists

    def _launch_limited(self, writer: Writer, blocks: str, inner: list[str]) -> None:
        """The launch that places what experts take, and says what they do not."""
        if self.limit is None:
            return
        groups, block = groups_of(self.limit, self.choices), self._block
        sizes = f"E={self.experts}, EP={power_of_two(self.experts)}, G={groups}"
        sizes += f", GP={power_of_two(groups)}, BLOCK={block}, PAIRS={power_of_two(block)}"
        inner = [*inner, python_source(self.limit.attrs["capacity"]), sizes]
        write(writer, f"place_limited[({blocks},)]({', '.join(inner)})")

    def _launch_one(self, writer: Writer, context: Context, made: dict[str, str]) -> None:
        """The only launch: routing, dispatch and the list of row tiles."""
        rows = self.dispatch.results[0].type.shape[0]
        outer = dict(zip(self.body.outputs, self.op.results, strict=True))
        offsets = outer.get(self.dispatch.results[1])
        name = context.names.fresh("tiles")
        room = f"{python_source(rows)}, {self.experts}, {FEW_ROWS}, device"
        writer.line(f"{name} = launch.empty_row_tiles({room})")
        made["tiles"] = name
        if offsets is not None:
            context.tiles[offsets, FEW_ROWS] = name
        with writer.block(f"if {only_if(rows)}:"):
            if self.scores is not None:
                tokens = python_source(self.dispatch.operands[0].type.shape[0])
                inner = [*arguments(self.scores.text, self.op, context, made), tokens]
                write(writer, f"{self.name}[(1,)]({', '.join(inner)})")
            else:
                most = power_of_two(int(self.op.attrs["tile"][0]) * self.choices)
                sizes = f"E={self.experts}, EP={power_of_two(self._buckets)}, P={most}"
                inner = [made[n] for n in ("index", *_RESULTS)]
                inner += [name, python_source(rows), sizes, f"BM={FEW_ROWS}"]
                write(writer, f"place_few_pairs[(1,)]({', '.join(inner)})")
        with writer.block("else:"):
            writer.line(f"{made['offsets']}.zero_()")

    def _launch_first(
        self, writer: Writer, context: Context, made: dict[str, str], pairs: str, blocks: str
    ) -> None:
        """The launch that counts the pairs of each expert."""
        if self.scores is None and self.limit is not None:
            groups = groups_of(self.limit, self.choices)
            sizes = f"E={self.experts}, EP={power_of_two(self.experts)}, G={groups}, PAIRS={PAIRS}"
            inner = f"{made['index']}, {made['histogram']}, {pairs}, {blocks}, {sizes}"
            write(writer, f"count_choices[({blocks},)]({inner})")
            return
        if self.scores is None:
            sizes = f"BUCKETS={self._buckets}, EP={power_of_two(self._buckets)}, PAIRS={PAIRS}"
            inner = f"{made['index']}, {made['histogram']}, {pairs}, {blocks}, {sizes}"
            write(writer, f"count_pairs[({blocks},)]({inner})")
            return
        tokens = python_source(self.dispatch.operands[0].type.shape[0])
        inner = ", ".join([*arguments(self.scores.text, self.op, context, made), tokens, blocks])
        write(writer, f"{self.name}[({blocks},)]({inner})")

    def _host_scores(self, writer: Writer, context: Context) -> str:
        """Write the scores as expressions; the name of the indices."""
        if self.reason:
            writer.line(f"# not in the kernel: {self.reason}")
        for inner, outer in zip(self.body.inputs, self.op.operands, strict=True):
            context.names.alias(inner, context.names[outer])
        source = self._placed
        for op in self.body.ops:
            if op is not self.dispatch and (op is not self.limit or self.few):
                self.emit_inner(writer, op, context)
        index = context.names[source]
        if source in self.body.inputs:
            return index
        copied = context.names.fresh("index")
        writer.line(f"{copied} = {index}.contiguous()")
        return copied

    @property
    def _placed(self) -> Value:
        """The indices that the kernels read: before a capacity, unless it is an expression."""
        is_kernel = self.limit is not None and not self.few
        return (self.limit if is_kernel and self.limit else self.dispatch).operands[0]

    def _allocate(self, writer: Writer, context: Context, index: str) -> dict[str, str]:
        """Make room for every result, and for what the kernels need besides; their names."""
        outer = dict(zip(self.body.outputs, self.op.results, strict=True))
        made = {"index": index}
        for inner, result in outer.items():
            if self.scores is None and inner not in self._made_by_kernels:
                context.names.alias(result, context.names[inner])
            else:
                context.allocate(writer, result)
        wanted = dict(zip(_RESULTS, self.dispatch.results, strict=True))
        if self.scores is not None:
            wanted["index"] = self.scores.index
        if self.limit is not None and not self.few:
            wanted["limited"] = self.limit.result
        for key, value in wanted.items():
            made[key] = self._room(writer, context, outer, value)
        return made

    @property
    def _made_by_kernels(self) -> tuple[Value, ...]:
        limited = () if self.limit is None or self.few else self.limit.results
        return (*self.dispatch.results, *limited)

    def _room(
        self, writer: Writer, context: Context, outer: dict[Value, Value], value: Value
    ) -> str:
        if value in outer:
            return context.names[outer[value]]
        name = context.names.fresh(value.hint)
        return context.empty(writer, name, value.type.shape, value.type.dtype)


_RESULTS = ("perm", "offsets", "inverse")
__all__ = ["KernelText", "Routing"]
