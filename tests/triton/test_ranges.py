"""Launches stand in ranges of a profiler, with the kernels of the plain module."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moec.inputs import random_inputs
from moec.ir import parse
from moec.manager import PassManager
from moec.pipeline import pipeline
from moec.runtime.artifact import build
from tests.test_observers import BLOCK


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("tokens", [0, 5])
def test_launches_are_named(tmp_path: Path, tokens: int, training: bool) -> None:
    lowered = PassManager(pipeline("triton", training)).run(parse(BLOCK))
    artifact = build(lowered, "triton", "training" if training else "inference", (), tmp_path)
    inputs = random_inputs(lowered, {"T": tokens})[: len(lowered.inputs)]
    inputs = [t.requires_grad_(training) for t in inputs]
    (plain,) = artifact(inputs)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        (found,) = artifact(inputs, "layers.3.mlp")
        if training:
            torch.autograd.grad(found.sum(), inputs[0])
    torch.testing.assert_close(found, plain, rtol=0, atol=0)
    names = {e.name for e in profile.events()}
    assert {
        "moec: layers.3.mlp forward",
        "moec: layers.3.mlp softmax+select+weight+dispatch",
        "moec: layers.3.mlp gather+up+silu",
        "moec: layers.3.mlp combine",
    } <= names
    assert ("moec: layers.3.mlp backward" in names) == training
    (path,) = tmp_path.glob("*_ranges_*.py")
    assert "@triton.jit" not in path.read_text()
