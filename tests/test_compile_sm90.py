"""Kernels emitted for real sizes compile for Hopper, without a GPU: tensor cores, no spills."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.emitted_check import SHAPES, artifact
from moec.ir import Value
from moec.ir.types import DTYPES
from moec.manager import PassManager
from moec.pipeline import pipeline
from moec.runtime.artifact import Artifact, build
from tests.graphs import MODELS
from tests.graphs import build as block_of

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter does not compile"
)
SHARED_BYTES = 232448  # of a Hopper processor, for one program
SERIAL = re.compile(r"C75\d\d")  # products that the assembler had to serialise


class Recorder:
    """Notes launches instead of making them."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def launcher(self, kernel: Any, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            self.launches.append((kernel, args, kwargs))

        return launch


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    """Kernels of this test are recorded, on tensors that hold no memory."""
    from triton.runtime.jit import KernelInterface

    noted = Recorder()
    monkeypatch.setattr(KernelInterface, "__getitem__", lambda k, grid: noted.launcher(k, grid))
    yield noted


def artifact_of(name: str, folder: Path, gluon: bool) -> Artifact:
    """A model's block for Hopper, for training."""
    if name != "gpt_oss":
        return artifact(SHAPES[name], descriptors=True, training=True, gluon=gluon)
    sized = replace(MODELS[name], hidden=2880, inner=2880, experts=32, choices=4)
    block = block_of(replace(sized, dtype="bf16"))
    graph = PassManager(pipeline("triton", True, True)).run(block.graph)
    return build(graph, "triton", "training", (), folder)


def run_on_nothing(compiled: Artifact) -> None:
    """Call forward and backward with tensors of the right sizes and no data."""

    def nothing(value: Value) -> torch.Tensor:
        shape = [d if isinstance(d, int) else 4096 for d in value.type.shape]
        return torch.empty(shape, dtype=DTYPES[value.type.dtype], device="meta")

    data = [nothing(v) for v in compiled.graph.inputs]
    _, saved = compiled.forward(*data)
    assert compiled.backward is not None
    kept = [data[i] for i in compiled.backward_inputs]
    compiled.backward([*kept, *saved, *map(nothing, compiled.graph.cotangents)])


def source_of(
    kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, dict[str, int]]:
    """What to compile for a launch, and its options."""
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    names = ("num_warps", "num_stages", "maxnreg")
    options: dict[str, int] = {k: kwargs.pop(k) for k in names if k in kwargs}
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for i, name in enumerate(kernel.arg_names):
        parameter = kernel.params[i]
        if parameter.is_constexpr:
            signature[name] = "constexpr"
            constants[(i,)] = values.get(name, parameter.default)
        else:
            signature[name] = type_of(values[name])
            if signature[name].startswith("*"):
                attributes[(i,)] = [["tt.divisibility", 16]]
    kind = GluonASTSource if kernel.is_gluon() else ASTSource
    return kind(kernel, signature, constants, attributes), options


NAMES = {
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
}


def type_of(value: Any) -> str:
    """A launch argument's type in Triton's words."""
    if isinstance(value, torch.Tensor):
        return f"*{NAMES[value.dtype]}"
    if isinstance(value, int):
        return "i32"
    block = ",".join(map(str, value.block_shape))
    layout = f",{value.layout!r}" if hasattr(value, "layout") else ""
    return f"tensordesc<{NAMES[value.base.dtype]}[{block}]{layout}>"


def assemble(ptx: str, folder: Path) -> str:
    """What the assembler says about a kernel's registers and products."""
    from triton.backends.nvidia.compiler import get_ptxas

    binary = get_ptxas(90).path
    (folder / "kernel.ptx").write_text(ptx)
    command = [binary, "-arch=sm_90a", "-v", str(folder / "kernel.ptx"), "-o", "/dev/null"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def compile_all(noted: Recorder, folder: Path) -> dict[str, tuple[str, str]]:
    """PTX and the assembler's words for every distinct kernel launched."""
    from triton.backends.compiler import GPUTarget

    found: dict[str, tuple[str, str]] = {}
    for kernel, args, kwargs in noted.launches:
        if kernel.__name__ not in found:
            code, options = source_of(kernel, args, dict(kwargs))
            compiled = triton.compile(
                code,
                target=GPUTarget("cuda", 90, 32),
                options={**options, "enable_fp_fusion": True},
            )
            assert compiled.metadata.shared <= SHARED_BYTES, kernel.__name__
            ptx = compiled.asm["ptx"]
            found[kernel.__name__] = ptx, assemble(ptx, folder)
    return found


@pytest.mark.parametrize(
    "name, gluon",
    [("olmoe", False), ("mixtral-8x7b", False), ("gpt_oss", False), ("qwen3-30b", True)],
)
def test_hopper_kernels(name: str, gluon: bool, recorder: Recorder, tmp_path: Path) -> None:
    run_on_nothing(artifact_of(name, tmp_path, gluon))
    word = "gl.warp_specialize(" if gluon else "tl.dot("
    products = [launch for launch in recorder.launches if word in launch[0].src]
    assert len(products) == 6
    if name != "olmoe":  # the other kernels differ in nothing but numbers
        recorder.launches = products
    for kernel, (ptx, log) in compile_all(recorder, tmp_path).items():
        assert not SERIAL.search(log), f"{kernel}: {log}"
        spilled = [int(n) for n in re.findall(r"(\d+) bytes spill stores", log)]
        assert max(spilled) <= 16, f"{kernel}: {log}"
        takes_part = any(launch[0].__name__ == kernel for launch in products)
        assert takes_part == ("wgmma.mma_async" in ptx), kernel
        assert not gluon or not takes_part or "cp.async.bulk.tensor" in ptx, kernel


def test_results_wait_in_slots(recorder: Recorder, tmp_path: Path) -> None:
    """Where results have room of their own, one is stored while the next is worked out."""
    run_on_nothing(artifact_of("qwen3-30b", tmp_path, True))
    recorder.launches = [n for n in recorder.launches if "gl.warp_specialize(" in n[0].src]
    waiting = 0
    for ptx, _ in compile_all(recorder, tmp_path).values():
        waits = set(re.findall(r"cp\.async\.bulk\.wait_group\.read\s+(\d+)", ptx))
        waiting += "1" in waits
    assert waiting == 3  # both products of the forward pass, and one of the backward pass


def test_repro_kernels(recorder: Recorder, tmp_path: Path) -> None:
    """All products of tokens by tensor cores, a router's and a shared expert's among them."""
    sized = replace(MODELS["deepseek_v3"], hidden=2048, inner=1024, experts=64, choices=4)
    block = block_of(replace(sized, dtype="bf16"))
    text = pipeline("triton", True, True, gluon=True, repro=True)
    graph = PassManager(text).run(block.graph)
    run_on_nothing(build(graph, "triton", "training", (), tmp_path))
    words = ("gl.warp_specialize(", "tl.dot(")
    products = [n for n in recorder.launches if any(word in n[0].src for word in words)]
    assert len(products) == 6 + 9  # the experts; router (again for its gradient), gate, up, down
    recorder.launches = [n for n in products if "logits" in n[0].__name__] + recorder.launches[-3:]
    for kernel, (_, log) in compile_all(recorder, tmp_path).items():
        assert not SERIAL.search(log), f"{kernel}: {log}"
        assert all(int(n) <= 16 for n in re.findall(r"(\d+) bytes spill stores", log)), kernel
