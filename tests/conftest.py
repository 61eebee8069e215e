"""What every test starts from: one thread, no network, a fixed seed."""

import os
import random
from collections.abc import Iterator
from typing import Any

# Read when transformers is first imported, hence set before any test module is.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import pytest
import torch
from hypothesis import settings

# The runner starts a worker per core; threads inside a worker would only contend.
torch.set_num_threads(1)

# Examples take as long as a loaded machine lets them, and CI must fail for changes, not for luck.
settings.register_profile("moec", deadline=None, derandomize=True)
settings.load_profile("moec")


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Make each test independent of which others ran before it."""
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """What Dynamo compiled for one test is nothing to the next."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def without_onednn() -> Iterator[None]:
    """Products in half precision by PyTorch's own code: oneDNN's, which some processors take, have
    a workspace by processor, of which predictions know nothing.
    """
    onednn: Any = torch.backends.mkldnn
    before = onednn.set_flags(False)[0]
    yield
    onednn.set_flags(before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
