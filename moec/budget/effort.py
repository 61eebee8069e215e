"""What one execution of a step takes: seconds from the rates of a device, and bytes that are needed
only while it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from moec.budget.problem import Effort, Sizes
from moec.budget.rates import GROUPED, Rates
from moec.budget.region_effort import region_effort
from moec.budget.steps import Step, is_elementwise, is_light
from moec.budget.values import Memories, Memory, number_at, size_at, tensor_at, tensors_of
from moec.budget.work import dtype_of, work_of


class Efforts:
    """The effort of every step of a captured graph at given sizes.

    ``workspace`` is asked what an operation needs beyond its arguments and results. ``compiled``
    are the steps that are one kernel, with the bytes that each needs beyond what it reads and
    makes, ``None`` where all that its operations make may be needed.
    """

    def __init__(
        self,
        memories: Memories,
        sizes: Sizes,
        rates: Rates,
        workspace: Callable[[fx.Node, tuple[Any, ...], Mapping[str, Any]], int] | None = None,
        compiled: Mapping[Step, int | None] | None = None,
    ) -> None:
        self.memories, self.sizes, self.rates = memories, sizes, rates
        self.workspace, self.compiled = workspace, compiled or {}

    def of(self, step: Step) -> Effort:
        """Seconds and bytes of one execution of a step."""
        arguments = self._concrete(step.main.args)
        region = region_effort(step.main, arguments)
        if region is not None:
            rate = self.rates.of(GROUPED, dtype_of(arguments))
            kernels = ((flops / rate, moved) for flops, moved in region.kernels)
            return Effort(sum(self.rates.seconds(*k) for k in kernels), region.workspace)
        own = self._workspace(step.main) if not is_light(step.main) else 0
        return Effort(self._seconds(step), max(self._inside(step), own))

    def _seconds(self, step: Step) -> float:
        """The time of a step's kernels: of a compiled group one, else one an operation."""
        if step in self.compiled:
            computing = sum(map(self._computing, step.nodes))
            return self.rates.seconds(computing, self._moved(step.nodes, step.makes))
        return sum(self._alone(node) for node in step.nodes if any(self.memories.made_by(node)))

    def _alone(self, node: fx.Node) -> float:
        moved = self._moved([node], self.memories.made_by(node))
        return self.rates.seconds(self._computing(node), moved)

    def _moved(self, nodes: Sequence[fx.Node], makes: Iterable[Memory]) -> int:
        return sum(map(self._bytes, (*self._read(nodes), *makes)))

    def assumed(self, step: Step) -> int:
        """What a group that is compiled may need beyond what it reads and makes, where it cannot be
        tried: nothing if each element follows from others, which is one kernel; else not more than
        its operations one by one, nor than to read and make all again.
        """
        computing = (n for n in step.nodes if any(self.memories.made_by(n)))
        if all(map(is_elementwise, computing)):
            return 0
        return min(self._inside(step), self._moved(step.nodes, step.makes))

    def _computing(self, node: fx.Node) -> float:
        """Seconds of a node's products or attention; 0 for what only moves bytes."""
        args, kwargs = self._concrete(node.args), self._concrete(node.kwargs)
        found = work_of(node.target, args, kwargs, self._concrete(node))
        return found.flops / self.rates.of(found.kind, found.dtype) if found else 0.0

    def _bytes(self, memory: Memory) -> int:
        return size_at(memory.size, self.sizes)

    def _read(self, nodes: Sequence[fx.Node]) -> Iterator[Memory]:
        """What nodes read, parameters too; of a long tensor that one shows a part of, all."""
        own = set(nodes)
        sources = dict.fromkeys(s for n in nodes for s in n.all_input_nodes if s not in own)
        return iter(dict.fromkeys(m for s in sources for m in self.memories.of(s)))

    def _inside(self, step: Step) -> int:
        """The most that a group's own operations hold beyond its result."""
        measured = self.compiled.get(step)
        if measured is not None:
            return measured
        made = {m: None for n in step.nodes for m in self.memories.made_by(n)}
        final = {m: n for n in step.nodes for s in n.all_input_nodes for m in self.memories.of(s)}
        live: set[Memory] = set()
        most = 0
        for node in step.nodes:
            live.update(m for m in self.memories.made_by(node) if m in made)
            most = max(most, sum(map(self._bytes, live)))
            live = {m for m in live if final.get(m) is not node}
        return max(0, most - sum(map(self._bytes, step.makes)))

    def _workspace(self, node: fx.Node) -> int:
        if self.workspace is None:
            return 0
        return self.workspace(node, self._concrete(node.args), self._concrete(node.kwargs))

    def _concrete(self, tree: Any) -> Any:
        """Arguments of a node, tensors on the meta device and numbers at the sizes."""
        return pytree.tree_map(self._at_sizes, tree)

    def _at_sizes(self, value: Any) -> Any:
        if not isinstance(value, fx.Node):
            return value
        found = value.meta.get("val")
        if isinstance(found, (list, tuple)):
            return [tensor_at(t, self.sizes) for t in tensors_of(value)]
        if isinstance(found, torch.Tensor):
            return tensor_at(found, self.sizes)
        return number_at(found, self.sizes)


__all__ = ["Efforts"]
