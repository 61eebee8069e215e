"""Passes with faults, for the tests of what moec does about them, here and in fresh processes."""

from __future__ import annotations

import sys
from dataclasses import replace

from moec import manager
from moec.ir import Builder, Graph
from moec.manager import PassDef


def raises(graph: Graph) -> Graph:
    """Raise."""
    raise KeyError("a bug")


def malformed(graph: Graph) -> Graph:
    """Leave an operand that nothing defines."""
    return graph.with_ops(graph.ops[1:])


def wrong(graph: Graph) -> Graph:
    """Forget the routing weights of the combine at the end."""
    builder = Builder(graph.ranges)
    builder.ops.extend(graph.ops[:-1])
    result = builder("moe.combine", *graph.ops[-1].operands[:3], hint="y")
    return replace(graph, ops=tuple(builder.ops), outputs=(result,))


LEAVES = frozenset({"t", "moe", "kern"})
PASSES = {f.__name__: PassDef(f.__name__, f, LEAVES) for f in (raises, malformed, wrong)}


def main() -> None:
    """The command line of a moec that has these passes."""
    from moec.cli.app import app

    manager.all_passes()
    manager._PASSES.update(PASSES)
    app(sys.argv[1:], prog_name="moec")


if __name__ == "__main__":
    main()
