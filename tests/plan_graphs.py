"""Graphs to plan for tests, random and training-like, and the optimum by brute force."""

import heapq
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from moec.plan import Node, Problem, make_problem
from moec.plan.problem import Source


def random_graph(seed: int, most: int = 8) -> Problem:
    """A small graph without structure: zero sizes, equal durations, pinned and kept nodes too."""
    return _random_graph(random.Random(seed), f"random{seed}", most)


def random_outputs(seed: int, most: int = 7) -> Problem:
    """The same with up to three outputs for each node, read and kept one by one."""
    draw = random.Random(f"outputs {seed}")
    plain = _random_graph(draw, f"outputs{seed}", most)
    nodes = []
    for node in plain.nodes:
        sizes = [draw.choice((0, 1, 2, 3, 5)) for _ in range(draw.choice((0, 1, 1, 2, 2, 3)))]
        kept = [draw.random() < 0.15 for _ in sizes]
        nodes.append(replace(node, outputs=tuple(sizes), keep=tuple(kept)))
    edges = [
        ((source, output), user)
        for user, sources in enumerate(plain.inputs)
        for source in sources
        for output in range(len(nodes[source].outputs))
        if draw.random() < 0.6
    ]
    return make_problem(plain.name, nodes, edges, plain.order)


def gradients(seed: int, most: int = 6) -> Problem:
    """A small graph with up to three kept results that nothing reads, as weights' gradients."""
    draw = random.Random(f"gradients {seed}")
    count = draw.randint(2, most)
    nodes = [
        Node(
            f"n{v}",
            draw.choice((1, 2, 3, 5, 8)),
            draw.choice((1, 2, 5)),
            draw.choice((0, 0, 2)),
            keep=draw.random() < 0.1,
            rematable=draw.random() < 0.9,
        )
        for v in range(count)
    ]
    edges = [(u, v) for v in range(count) for u in range(v) if draw.random() < 0.5]
    for k in range(draw.randint(1, 3)):
        about = draw.choice((1, 2, 4)), draw.choice((1, 3)), draw.choice((0, 2))
        edges += [(u, len(nodes)) for u in draw.sample(range(count), draw.choice((1, 2)))]
        nodes.append(Node(f"gradient{k}", *about, keep=True, rematable=draw.random() < 0.7))
    return make_problem(f"gradients{seed}", nodes, edges)


def _random_graph(draw: random.Random, name: str, most: int) -> Problem:
    count = draw.randint(1, most)
    nodes = [
        Node(
            f"n{v}",
            draw.choice((0, 1, 2, 3, 5, 8)),
            draw.choice((0, 1, 2, 5)),
            draw.choice((0, 0, 0, 2)),
            keep=draw.random() < 0.1,
            rematable=draw.random() < 0.9,
        )
        for v in range(count)
    ]
    edges = [(u, v) for v in range(count) for u in range(v) if draw.random() < 0.4]
    order = _shuffled(count, edges, draw)
    return make_problem(name, nodes, edges, order)


def layered(width: int, depth: int, seed: int = 0) -> Problem:
    """Layers of nodes; each reads two of the layer before and, at times, one of earlier layers."""
    draw = random.Random(seed)
    nodes, edges = [Node("source", 10, 0)], []
    for layer in range(depth):
        first = 1 + layer * width
        for v in range(first, first + width):
            nodes.append(Node(f"n{v}", draw.randint(5, 60), draw.randint(1, 99)))
            before = range(first - width, first) if layer else range(1)
            edges += [(u, v) for u in draw.sample(before, min(2, len(before)))]
            if layer > 1 and draw.random() < 0.3:
                edges.append((draw.randrange(1, first - width), v))
    nodes.append(Node("sink", 1, 0, keep=True))
    read = {u for u, _ in edges}
    edges += [(v, len(nodes) - 1) for v in range(1, len(nodes) - 1) if v not in read]
    order = _shuffled(len(nodes), edges, draw)
    return make_problem(f"layered{width}x{depth}s{seed}", nodes, edges, order)


def training(blocks: int) -> Problem:
    """Forward and backward of equal blocks; the backward reads what the forward made."""
    nodes, edges = [Node("input", 8, 1)], []
    forward, last = [], 0
    for block in range(blocks):
        names = (("norm", 8, 1), ("up", 32, 9), ("act", 16, 2), ("down", 8, 9))
        made: list[int] = []
        for name, size, duration in names:
            edges.append((last, len(nodes)))
            made.append(last := len(nodes))
            nodes.append(Node(f"{name}{block}", size, duration))
        forward.append(made)
    for block in reversed(range(blocks)):
        for source in reversed(forward[block]):
            node = nodes[source]
            edges += [(last, len(nodes)), (source, len(nodes))]
            last = len(nodes)
            nodes.append(Node(f"{node.name}.grad", node.size, 2 * node.duration))
    return make_problem(f"training{blocks}", nodes, edges)


def joint(layers: int, tokens: int = 64) -> Problem:
    """A training step of equal layers as it comes from a traced model: operations with several
    outputs, names that say nothing, a boundary that turns the forward's output into its gradient,
    and gradients of weights that are kept.
    """
    nodes: list[Node] = []
    edges: list[tuple[Source, int]] = []

    def run(
        outputs: tuple[int, ...], duration: float, *inputs: tuple[int, int], **marks: Any
    ) -> list[tuple[int, int]]:
        edges.extend((source, len(nodes)) for source in inputs)
        nodes.append(Node(f"op{len(nodes)}", outputs, duration, **marks))
        return [(len(nodes) - 1, output) for output in range(len(outputs))]

    row = 8 * tokens
    kept = (False, True)
    (x,) = run((row,), 1)
    saved = []
    for _ in range(layers):
        y, scale = run((row, tokens), 1, x)
        o, lse = run((row, 2 * tokens), 12, y, workspace=row)
        (h,) = run((row,), 1, x, o)
        z, scale2 = run((row, tokens), 1, h)
        logits, routing = run((2 * tokens, tokens), 2, z, rematable=False)
        r, up = run((row, 5 * row), 30, z, routing, workspace=2 * row)
        saved.append((x, y, scale, o, lse, h, z, scale2, logits, routing, up))
        (x,) = run((row,), 1, h, r)
    (g,) = run((row,), 20, x, workspace=4 * row, rematable=False)
    for x, y, scale, o, lse, h, z, scale2, logits, routing, up in reversed(saved):
        gz, _ = run((row, 12 * row // layers), 60, g, z, routing, up, keep=kept, workspace=4 * row)
        (gl,) = run((2 * tokens,), 1, g, logits)
        (gh,) = run((row,), 2, gz, gl, h, scale2, g)
        gy, _ = run((row, 4 * row // layers), 30, gh, y, o, lse, keep=kept, workspace=row)
        (g,) = run((row,), 2, gy, x, scale, gh)
    run((), 1, g)
    return make_problem(f"joint{layers}", nodes, edges)


def _shuffled(count: int, edges: list[tuple[int, int]], draw: random.Random) -> list[int]:
    waiting = {v: {a for a, b in edges if b == v} for v in range(count)}
    order: list[int] = []
    while waiting:
        ready = sorted(v for v, needs in waiting.items() if not needs)
        order.append(draw.choice(ready))
        del waiting[order[-1]]
        for needs in waiting.values():
            needs.discard(order[-1])
    return order


def least_time(problem: Problem, budget: int) -> float | None:
    """The optimum over all orders and repetitions; None if nothing fits.

    Goes through sets (held outputs, nodes that ran). A step runs a node with any of the held
    outputs kept from before, so that freeing is no step of its own.
    """
    count = len(problem.nodes)
    queue: list[tuple[float, tuple[int, ...], tuple[int, ...]]] = [(0, (), ())]
    seen = set()
    while queue:
        spent, held, ran = heapq.heappop(queue)
        if (held, ran) in seen:
            continue
        seen.add((held, ran))
        if len(ran) == count and set(problem.kept) <= set(held):
            return spent
        for v in range(count):
            node = problem.nodes[v]
            if not set(problem.reads[v]) <= set(held) or (v in ran and not node.rematable):
                continue
            made = set(problem.made[v])
            for kept in _subsets(set(held) - made):
                total = sum(problem.sizes[u] for u in kept) + node.size + node.workspace
                if not kept >= set(problem.reads[v]) or total + problem.resident > budget:
                    continue
                after = tuple(sorted(kept | made)), tuple(sorted({*ran, v}))
                heapq.heappush(queue, (spent + node.duration, *after))
    return None


def _subsets(items: set[int]) -> Iterator[set[int]]:
    ordered = sorted(items)
    for mask in range(1 << len(ordered)):
        yield {item for k, item in enumerate(ordered) if mask >> k & 1}
