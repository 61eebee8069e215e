"""Model scope under a memory budget: training calls run a planned step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch.utils import _pytree as pytree

from moec.budget.sizes import class_of
from moec.budget.text import shown_bytes
from moec.errors import CompileError
from moec.model_scope import ModelScope, traced_once
from moec.session import Session
from moec.share import is_managed
from moec.surroundings import is_traced, is_transformed

if TYPE_CHECKING:
    from moec.budget.backend import PlannedStep

# A plan serves calls at which others hold less than it reserves by up to this share of the budget.
_SERVED_SHARE = 1 / 64
# In units of so many bytes others' memory counts.
_UNIT = {"cuda": 2 << 20}


@dataclass(frozen=True)
class Budget:
    """Bytes that a step of training may need in all: ``bytes``, of which ``reserve`` are for what
    moec does not see (the state of an optimizer); ``seconds`` for planning; ``fuse``: whether
    groups of light operations are compiled, ``None`` for the device's default; ``rates``: a file of
    what the device does in a second; ``count_others``: on a GPU count all that is allocated;
    ``loss_alone``: of a model that returns a scalar, other outputs are planned without gradients.
    """

    bytes: int
    reserve: int = 0
    seconds: float = 20.0
    fuse: bool | None = None
    rates: str | None = None
    count_others: bool = True
    loss_alone: bool = True


@dataclass(frozen=True)
class _Compiled:
    step: PlannedStep
    run: Any
    settings: dict[str, Any]


class BudgetScope(ModelScope):
    """What a model with a memory budget asks at each call.

    Calls without gradients run the model's own code around the compiled regions. Every class of
    sizes (:func:`moec.budget.sizes.class_of`) has a plan of its own, for the largest of the class.
    """

    def __init__(self, session: Session, name: str, budget: Budget) -> None:
        super().__init__(session, name, "moec")
        self.budget = budget
        self.loss_alone = budget.loss_alone
        self.steps: dict[tuple[Any, int], _Compiled] = {}

    def bound_to(self, module: nn.Module) -> BudgetScope:
        """The same for a copy of the model."""
        return BudgetScope(self.session, self.name, self.budget)

    def call(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The result of the planned step, or ``NotImplemented`` where no gradients are asked for.

        Raises:
            BudgetError: no plan is within the budget.
            CompileError: the step cannot be captured as one graph.
        """
        if not torch.is_grad_enabled() or is_transformed():
            return NotImplemented
        if is_traced():
            self.session.warn(
                f"moec: {self.name} is part of another compilation, which its memory budget does"
                " not reach; compile it alone"
            )
            return NotImplemented
        given = pytree.tree_leaves((args, kwargs))
        tensors = [v for v in given if isinstance(v, torch.Tensor)]
        reserve = self._reserve(module, tensors)
        compiled = self._step(module, class_of(tensors), reserve)
        try:
            with traced_once(given), torch._dynamo.config.patch(compiled.settings):
                result = compiled.run(module, *args, **kwargs)
        except TorchDynamoException as error:
            raise self._explained(compiled.step, module, error) from error
        self.served += 1
        return result

    def _step(self, module: nn.Module, kind: Any, held: int) -> _Compiled:
        """The step of a class of sizes that keeps free what others hold now, or a little more."""
        most = held + int(self.budget.bytes * _SERVED_SHARE)
        others = sorted(reserve for known, reserve in self.steps if known == kind)
        for reserve in others:
            if held <= reserve <= most:
                return self.steps[kind, reserve]
        # what grew once may grow on: half of the share is for that
        reserve = (held + most) // 2 if others else held
        self.steps[kind, reserve] = self._planned(module, reserve)
        return self.steps[kind, reserve]

    def _planned(self, module: nn.Module, reserve: int) -> _Compiled:
        from moec.budget.backend import PlannedStep

        _check_is_whole(module, self.name)
        limit, is_declared = self.budget.seconds, self.check is not None
        about = reserve, limit, is_declared, self.budget.fuse, self.budget.rates, self.session.warn
        otherwise = self._plan_for_all if self.loss_alone else None
        step = PlannedStep(self.name, self.budget.bytes, *about, otherwise)
        run = torch.compile(self._forward(module), fullgraph=True, dynamic=True, backend=step)
        return _Compiled(step, run, _settings(module))

    def _plan_for_all(self) -> None:
        """Gradients do not come from the loss alone; plan anew at the next call."""
        self.session.warn(
            f"moec: {self.name} was asked for a gradient of an output other than its loss; it came"
            " from running the model's code again, outside the plan of the memory budget. From now"
            " on gradients of all outputs are planned; the option gradients_of='all' does so from"
            " the first call"
        )
        self.loss_alone = False
        self.steps.clear()

    def _reserve(self, module: nn.Module, inputs: Sequence[torch.Tensor]) -> int:
        """Bytes that are held beside parameters, buffers and inputs: gradients of earlier steps
        that this one adds to, and on a GPU all else that PyTorch's allocator has given out.
        """
        every = [_local(t) for t in (*module.parameters(), *module.buffers())]
        own = {t.untyped_storage().data_ptr(): t for t in every}
        known = sum(t.untyped_storage().nbytes() for t in own.values())
        given = [_local(p.grad) for p in module.parameters() if p.grad is not None]
        grads = sum(g.nbytes for g in given)
        found = grads
        device = next((t.device for t in own.values()), torch.device("cpu"))
        if device.type == "cuda" and self.budget.count_others:
            taken = sum(t.untyped_storage().nbytes() for t in inputs)
            found = max(grads, torch.cuda.memory_allocated(device) - known - taken)
        unit = _UNIT.get(device.type, 1)
        return max(self.budget.reserve, -(-found // unit) * unit)

    def _explained(self, step: PlannedStep, module: nn.Module, error: Exception) -> Exception:
        from moec.budget.uncaptured import uncaptured

        return step.error or uncaptured(module, self.name, error)

    def lines(self) -> list[str]:
        """What :func:`moec.explain` says about it."""
        head = f"  memory budget: {shown_bytes(self.budget.bytes)}"
        if not self.steps:
            return [f"{head}, planned at the first call with gradients"]
        return [head, *(line for c in self.steps.values() for line in c.step.lines())]


def _check_is_whole(module: nn.Module, name: str) -> None:
    """Refuse a model whose parts FSDP2 gathers and frees on the way."""
    parts = [path for path, m in module.named_modules() if path and is_managed(m)]
    if parts:
        raise CompileError(
            f"{name} cannot be planned as a whole: FSDP2 gathers and frees the weights of"
            f" {', '.join(parts[:2])}{' ...' if len(parts) > 2 else ''} while it runs, which no"
            " single graph has. Give the memory budget to each part that is sharded, before"
            f" fully_shard: model.set_submodule('{parts[0]}', fully_shard(moec.compile("
            f"model.get_submodule('{parts[0]}'), memory_budget=...,"
            " options={'count_others': False}))); or shard the model as one unit. See"
            " docs/budget.md"
        )


def _settings(module: nn.Module) -> dict[str, Any]:
    """How the tracer is to see a model. DDP would cut its graph into pieces, each with the whole
    budget. What FSDP2 manages would have its numbers, as the width of a head, taken for sizes.
    """
    managed = any(getattr(m, "_is_fsdp_managed_module", False) for m in module.modules())
    return {"optimize_ddp": False, **({"specialize_int": True} if managed else {})}


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """What of a tensor this process holds."""
    return tensor._local_tensor if hasattr(tensor, "_local_tensor") else tensor


__all__ = ["Budget", "BudgetScope"]
