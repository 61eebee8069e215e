"""Tests of emitted Triton kernels on the CPU, through Triton's interpreter.

Triton chooses between interpreter and compiler when it is imported, for the whole process. So this
folder has a process of its own (`make test` starts it), and is left out of every other run.
"""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """numpy warns where a GPU gives infinity or NaN in silence."""
    for item in items:
        if "tests/triton" in str(item.path):
            item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning"))


def _poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = make(*args, **kwargs)
        return tensor.fill_(torch.nan if tensor.is_floating_point() else -7)

    return empty


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory holds NaN: what no kernel wrote shows in the results."""
    monkeypatch.setattr(torch, "empty", _poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", _poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))
