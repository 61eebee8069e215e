"""What one execution of a step takes: seconds from the rates of a device, and bytes that are needed
only while it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import flop_registry

from moec.budget.fused import Fused
from moec.budget.problem import Effort, Sizes
from moec.budget.region_effort import region_effort
from moec.budget.steps import Step, is_light
from moec.budget.values import Memories, Memory, number_at, size_at, tensor_at, tensors_of


@dataclass(frozen=True)
class Rates:
    """What a device does in a second: operations of products, bytes moved; and the seconds that one
    more kernel takes at least.
    """

    flops: float
    bytes: float
    launch: float

    def seconds(self, flops: float, moved: float) -> float:
        """The time of one kernel, which waits for the slower of the two."""
        return self.launch + max(flops / self.flops, moved / self.bytes)


# Of an H100 in bfloat16, what large products and copies reach; of a CPU, of a few cores.
RATES = {"cuda": Rates(6e14, 2.7e12, 4e-6), "cpu": Rates(1e11, 2e10, 4e-6)}


class Efforts:
    """The effort of every step of a captured graph at given sizes."""

    def __init__(
        self,
        memories: Memories,
        sizes: Sizes,
        rates: Rates,
        workspace: Callable[[fx.Node, tuple[Any, ...], Mapping[str, Any]], int] | None = None,
        fused: Mapping[Step, Fused] | None = None,
    ) -> None:
        self.memories, self.sizes, self.rates = memories, sizes, rates
        self.workspace, self.fused = workspace, fused or {}

    def of(self, step: Step) -> Effort:
        """Seconds and bytes of one execution of a step."""
        flops = sum(self._flops(n) for n in step.nodes)
        moved = sum(self._bytes(m) for m in (*self._read(step), *step.makes))
        region = region_effort(step.main, self._concrete(step.main.args))
        if region is not None:
            seconds = sum(self.rates.seconds(*kernel) for kernel in region.kernels)
            return Effort(seconds, region.workspace)
        own = self._workspace(step.main) if not is_light(step.main) else 0
        return Effort(self.rates.seconds(flops, moved), max(self._inside(step), own))

    def _bytes(self, memory: Memory) -> int:
        return size_at(memory.size, self.sizes)

    def _read(self, step: Step) -> Iterator[Memory]:
        """What a step reads, parameters too; of a long tensor that it shows a part of, all."""
        own = set(step.nodes)
        sources = dict.fromkeys(s for n in step.nodes for s in n.all_input_nodes if s not in own)
        return iter(dict.fromkeys(m for s in sources for m in self.memories.of(s)))

    def _inside(self, step: Step) -> int:
        """The most that a group's own operations hold beyond its result."""
        fused = self.fused.get(step)
        if fused is not None and fused.workspace is not None:
            return fused.workspace
        made = {m: None for n in step.nodes for m in self.memories.made_by(n)}
        final = {m: n for n in step.nodes for s in n.all_input_nodes for m in self.memories.of(s)}
        live: set[Memory] = set()
        most = 0
        for node in step.nodes:
            live.update(m for m in self.memories.made_by(node) if m in made)
            most = max(most, sum(map(self._bytes, live)))
            live = {m for m in live if final.get(m) is not node}
        return max(0, most - sum(map(self._bytes, step.makes)))

    def _flops(self, node: fx.Node) -> float:
        packet = getattr(node.target, "overloadpacket", None)
        if packet not in flop_registry:
            return 0.0
        args, kwargs = self._concrete(node.args), self._concrete(node.kwargs)
        result = self._concrete(node)
        return float(flop_registry[packet](*args, **kwargs, out_val=result))

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


__all__ = ["RATES", "Efforts", "Rates"]
