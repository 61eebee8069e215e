"""Loops of emitted kernels on intervals: what their variables can be in any round."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeAlias

from tests.widths import FULL, WORD, Abstract, Int, Span, join, one

Env: TypeAlias = dict[str, Abstract]
COMPARED: dict[type, str] = {
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
    ast.Eq: "==",
    ast.NotEq: "!=",
}


class Evaluator(Protocol):
    """What runs the statements of a loop."""

    silent: int

    def value(self, node: ast.expr, env: Env) -> Abstract: ...

    def block(self, body: list[ast.stmt], env: Env) -> Abstract | None: ...

    def fault(self, node: ast.AST | None, what: str) -> None: ...

    def limited(self, name: str, value: Abstract) -> Abstract: ...


@dataclass
class Loop:
    """A loop and the variables before it."""

    kernels: Evaluator
    node: ast.For | ast.While
    env: Env
    growths: dict[str, tuple[int, int]] = field(default_factory=dict)

    def run(self) -> None:
        """Leave in the environment what its variables can be after the loop."""
        before = dict(self.env)
        self.start, self.stop, self.step = self.bounds()
        self.kernels.silent += 1
        state = self.settled()
        self.kernels.silent -= 1
        if isinstance(self.node, ast.For) and not self.is_unrolled:
            most = self.stop.high + self.step.high
            if most > WORD:
                self.kernels.fault(self.node.iter, f"counts up to {most} in 32 bits")
        after = self.round(state)
        self.env.clear()
        self.env |= {n: join(before[n], v) if n in before else v for n, v in after.items()}

    @property
    def is_unrolled(self) -> bool:
        """Whether the loop's variable is known while compiling."""
        assert isinstance(self.node, ast.For) and isinstance(self.node.iter, ast.Call)
        return ast.unparse(self.node.iter.func).endswith("static_range")

    def bounds(self) -> tuple[Span, Span, Span]:
        """Start, end and step of a ``for``."""
        if isinstance(self.node, ast.While):
            return one(0), one(0), one(1)
        assert isinstance(self.node.iter, ast.Call)
        spans = [self.kernels.value(a, self.env).span for a in self.node.iter.args]
        start, stop = (one(0), spans[0]) if len(spans) == 1 else spans[:2]
        return start, stop, spans[2] if len(spans) > 2 else one(1)

    def round(self, state: Env) -> Env:
        """The variables after one round that begins with these."""
        env = dict(state)
        if isinstance(self.node, ast.For):
            assert isinstance(self.node.target, ast.Name)
            span = Span(self.start.low, max(self.stop.high - 1, self.start.low))
            env[self.node.target.id] = Int(0 if self.is_unrolled else 32, span)
        else:
            refine(self.node.test, env, self.kernels, True)
        self.kernels.block(self.node.body, env)
        return env

    def settled(self) -> Env:
        """What the variables can be at the beginning of any round."""
        env, state = self.env, dict(self.env)
        for _ in range(2):
            found = self.round(state)
            state = {n: join(state[n], found[n]) for n in env}
        moving = list[str]()
        while True:
            grown = self.round(state)
            new = [n for n in env if join(state[n], grown[n]) != state[n] and n not in self.growths]
            for name in new:
                again = name in moving
                state[name] = self.kernels.limited(name, self.widened(state, grown, name, again))
            moving += new
            if not new:
                break
        counted = [n for n in moving if n in self.growths]
        for _ in range(2):  # what the loop's condition cuts off
            found = self.round(state)
            state |= {n: join(env[n], found[n]) for n in moving if n not in counted}
        for name in counted:
            if not self.is_stepped(name) and self.growth(state, name, 0) != self.growths[name]:
                state[name] = replace(env[name], span=Span(-FULL, FULL))
        return state

    def widened(self, state: Env, grown: Env, name: str, again: bool) -> Abstract:
        """A counter by its growth and the number of rounds; anything else without limit where it
        moves.
        """
        value = self.env[name]
        if not isinstance(value, Int):
            return join(value, state[name])
        if self.is_stepped(name):
            return self.induced(name, value)
        old, new = state[name].span, grown[name].span
        low = -FULL if new.low < old.low or again else old.low
        high = FULL if new.high > old.high or again else old.high
        wide = replace(value, bits=max(value.bits, 32))
        if not self.is_counter(name):
            return replace(wide, span=Span(low, high))
        growth, rounds = self.growth(state, name, 0), self.rounds(state)
        if growth != self.growth(state, name, 1000) or rounds is None:
            return replace(wide, span=Span(-FULL, FULL))
        self.growths[name] = growth
        low, high = value.span.low + min(growth[0], 0) * rounds, max(growth[1], 0) * rounds
        return replace(wide, span=Span(low, value.span.high + high))

    def growth(self, state: Env, name: str, first: int) -> tuple[int, int]:
        """How much a variable that begins a round with one number has changed after it."""
        value = replace(self.env[name], bits=max(self.env[name].bits, 32), span=one(first))
        span = self.round({**state, name: value})[name].span
        return span.low - first, span.high - first

    def rounds(self, state: Env) -> int | None:
        """The most rounds."""
        if isinstance(self.node, ast.For):
            return max(0, -(-(self.stop.high - self.start.low) // max(self.step.low, 1)))
        match self.node.test:
            case ast.Compare(left=ast.Name(id=name), ops=[ast.Lt()], comparators=[most]):
                least, _ = self.growth(state, name, 0)
                limit = int(self.kernels.value(most, state).span.high)
                if least >= 1:
                    return max(0, -(-(limit - int(self.env[name].span.low)) // least))
        return None

    def is_counter(self, name: str) -> bool:
        """Whether a variable is added to, here or by a function that is given it."""
        return any(_counts(node, name) for inner in self.node.body for node in ast.walk(inner))

    def is_stepped(self, name: str) -> bool:
        """Whether ``name += step`` stands in a loop by steps."""
        match self.node:
            case ast.For(iter=ast.Call(args=[_, _, step])):
                same = [n for n in self.node.body if _adds(n, name, ast.dump(step))]
                return len(same) == 1
        return False

    def induced(self, name: str, value: Int) -> Int:
        """Such a variable keeps its distance to the loop's own."""
        self.growths[name] = (0, 0)
        most = value.span.high + max(self.stop.high - 1 - self.start.low, 0)
        return replace(value, bits=32, span=Span(value.span.low, most))


def _counts(node: ast.AST, name: str) -> bool:
    match node:
        case ast.AugAssign(target=ast.Name(id=found)):
            return found == name
        case ast.Assign(targets=[ast.Tuple(elts=elts)], value=ast.Call(args=args)):
            given = {a.id for a in args if isinstance(a, ast.Name)}
            return name in given and name in {e.id for e in elts if isinstance(e, ast.Name)}
    return False


def _adds(node: ast.stmt, name: str, step: str) -> bool:
    match node:
        case ast.AugAssign(target=ast.Name(id=found), op=ast.Add(), value=value):
            return found == name and ast.dump(value) == step
    return False


def refine(test: ast.expr, env: Env, kernels: Evaluator, holds: bool) -> None:
    """Cut a variable by a comparison with something else that holds, or does not."""
    match test:
        case ast.Compare(left=ast.Name(id=name), ops=[op], comparators=[other]):
            value, limit = env.get(name), kernels.value(other, env)
            sign = COMPARED[type(op)]
            if not isinstance(value, Int) or not isinstance(limit, Int):
                return
            if not holds:
                sign = {"<": ">=", "<=": ">", ">": "<=", ">=": "<"}.get(sign, "")
            low, high = limit.span.low, limit.span.high
            cut = {
                "<": (-FULL, high - 1),
                "<=": (-FULL, high),
                ">": (low + 1, FULL),
                ">=": (low, FULL),
                "==": (low, high),
            }.get(sign)
            if cut is not None:
                env[name] = replace(value, span=value.span.inside(*cut))
