"""``moec doctor``: what it says of a model, of a checkpoint's configuration, and its exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from moec.capture.model_spec import load_small
from moec.capture.shrink import signature
from moec.cli.app import app
from moec.doctor import diagnose
from tests.bad_models import Block, Loop

# A checkpoint of 200 GB: most fields as published models have them.
MIXTRAL = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
DEEPSEEK = {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "num_hidden_layers": 5,
    "first_k_dense_replace": 2,
    "hidden_size": 1024,
    "n_routed_experts": 64,
    "vocab_size": 1000,
}


class Branching(Loop):
    """A block that reads a value, which no capture can do again."""

    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x) * (2 if x.sum() > 0 else 1)


def two_structures() -> nn.Module:
    """A factory for the command line."""
    return nn.Sequential(Loop(), Block(), Loop(), Branching())


def without_experts() -> nn.Module:
    """A factory for the command line."""
    return nn.Linear(3, 3)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["doctor", *arguments])


def test_a_report_has_an_entry_for_each_structure() -> None:
    model = two_structures().train()
    report = diagnose(model)
    assert [(s.kind, s.count) for s in report.structures] == [
        ("Loop", 2),
        ("Block", 1),
        ("Branching", 1),
    ]
    first, block, left = report.structures
    assert (first.inference, first.training) == ("compiled", "compiled")
    assert "moe.select {k=2}" in first.router
    assert "one module an expert" in first.experts
    assert "not gated, silu" in first.experts
    assert "2 products, stacked [E, out, in], gated, silu" in block.experts
    assert left.inference == "left as it was"
    assert "as a Python number" in left.reason
    assert left.advice
    assert not report.is_well
    assert model.training and all(m.training for m in model.modules())


def test_each_device_has_a_target() -> None:
    (structure,) = diagnose(Block()).structures
    assert [s.target for s in structure.served] == ["aten", "triton", "triton"]
    assert not any(s.failure for s in structure.served)
    assert structure.served[1].kernels > 0


def test_sizes_that_the_copy_engine_does_not_take_are_named() -> None:
    (structure,) = diagnose(Block()).structures  # its inner width is 6
    assert any("[4, 8, 6] have rows" in warning for warning in structure.warnings)


@pytest.mark.parametrize("settings", [MIXTRAL, DEEPSEEK], ids=["mixtral", "deepseek_v3"])
def test_a_checkpoint_of_real_size(settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(settings))
    result = run(str(tmp_path), "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    (structure,) = report["structures"]
    count = {"mixtral": 32, "deepseek_v3": 3}[settings["model_type"]]
    assert structure["count"] == count
    assert structure["first"].startswith(
        f"model.layers.{0 if settings['model_type'] == 'mixtral' else 2}."
    )
    assert structure["inference"] == structure["training"] == "compiled"
    assert "a small model of the same structure stands for" in report["note"]
    assert "of a structure" not in " ".join(report["warnings"])


def test_a_small_model_has_the_structure_of_the_large_one(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(DEEPSEEK))
    loaded = load_small(str(file))
    assert loaded.whole is not None
    models: list[Any] = [loaded.model, loaded.whole]
    small, large = (m.model.layers for m in models)
    assert len(small) == 3 and len(large) == 5
    assert signature(small[2]) == signature(large[4])
    assert signature(small[0]) != signature(small[2])
    assert small[2].mlp.experts.gate_up_proj.shape[0] < 64
    assert all(p.is_meta for p in loaded.whole.parameters())


def test_exit_codes_of_factories() -> None:
    left = run("tests.test_doctor:two_structures")
    assert left.exit_code == 1
    assert "2 x Loop, the first at 0" in left.stdout
    assert "what to do:" in left.stdout
    nothing = run("tests.test_doctor:without_experts")
    assert nothing.exit_code == 1
    assert "no MoE block found" in nothing.stdout
    good = run("tests.bad_models:Block")
    assert good.exit_code == 0


@pytest.mark.parametrize(
    "arguments", [(), ("mixtral", "--list"), ("--speed",), ("no_such_model",), ("nothing.json",)]
)
def test_wrong_usage(arguments: tuple[str, ...]) -> None:
    assert run(*arguments).exit_code == 2
