"""A graph as a function of one list, which it empties: arguments die after their last use."""

from collections.abc import Callable
from typing import Any

import torch.fx as fx
from torch.fx.graph import CodeGen


class _ListOfArguments(CodeGen):
    """Generated code whose only argument is a list."""

    def gen_fn_def(
        self,
        free_vars: list[str],
        maybe_return_annotation: str,
        *,
        expanded_def: bool = False,
    ) -> str:
        """The head of the function: names taken from the list, which is empty afterwards."""
        names = [v.partition(":")[0].partition("=")[0].strip() for v in free_vars if v != "self"]
        lines = [f"def {self._func_name}(self, arguments){maybe_return_annotation}:"]
        if names:
            lines += [f"    {', '.join(names)}, = arguments", "    arguments.clear()"]
        return "\n".join(lines)


def boxed_function(module: fx.GraphModule) -> Callable[..., Any]:
    """The code of a graph: one operation a line, each result released after its last use, the
    arguments too.
    """
    module.graph.set_codegen(_ListOfArguments())
    module.recompile()
    run: Any = module.forward

    def boxed(arguments: list[Any]) -> Any:
        return run(arguments)

    boxed._boxed_call = True  # type: ignore[attr-defined]
    return boxed


__all__ = ["boxed_function"]
