"""No host in the loop: a compiled block never waits for the GPU, and one CUDA graph serves every
routing.

    python -m benchmarks.no_host                     OLMoE, Qwen3, Mixtral

Printed for each model: whether forward and backward pass under
``torch.cuda.set_sync_debug_mode("error")``, where any wait is an error; of how many routings a
captured graph's replay gave other bits than the plain call, for inference and for a training step;
the same for the calls of few tokens that are kept as one graph of the driver, and for
``mode="reduce-overhead"`` (there beyond rounding). Every figure must be 0.
"""

import argparse
import warnings
from collections.abc import Iterator
from typing import Any

import torch

import moec

from .hf_blocks import SHAPES, Shape, random_block
from .report import describe, environment, markdown_table

TOKENS = 512


def inputs_of(shape: Shape, block: Any, tokens: int, count: int) -> Iterator[torch.Tensor]:
    """Inputs whose routings differ: random, Zipf, all to the same experts, many empty experts."""
    gate = block.gate.weight.detach().float()
    order = torch.arange(1, shape.experts + 1, device="cuda").float()
    wanted = {
        "random": torch.zeros_like(order),
        "zipf": -2 * order.log(),
        "one": torch.where(order <= shape.top_k, 60.0, 0.0),
        "empty": torch.where(order <= shape.experts / 4, 30.0, 0.0),
    }
    inverse = torch.linalg.pinv(gate)
    for i in range(count):
        logits = list(wanted.values())[i % len(wanted)]
        shuffled = logits[torch.randperm(shape.experts, device="cuda")]
        x = torch.randn(tokens, shape.hidden, device="cuda") + shuffled @ inverse.t()
        yield x.bfloat16()[None]


def without_syncs(block: Any, x: torch.Tensor) -> str:
    """Forward and backward where waiting for the GPU is an error."""
    run = moec.compile(block)
    run(x.clone().requires_grad_()).sum().backward()
    torch.cuda.synchronize()
    fresh = x.clone().requires_grad_()
    dy = torch.randn_like(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(fresh).backward(dy)
        with torch.no_grad():
            run(x)
            run(x[:, :4])
            run(x[:, :4])
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "passes"


def replayed(shape: Shape, block: Any, count: int, training: bool) -> int:
    """Of how many routings one graph's replay differs from the plain call."""
    run = moec.compile(block)
    parameters = [p for p in block.parameters() if training]

    def step(x: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
        if not training:
            with torch.no_grad():
                return [run(x)]
        y = run(x)
        return [y.detach(), *torch.autograd.grad(y, [x, *parameters], dy)]

    place = torch.zeros(1, TOKENS, shape.hidden, device="cuda").bfloat16()
    place.requires_grad_(training)
    dy = torch.randn_like(place)
    side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(side):
        step(place, dy)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(place, dy)
    wrong = 0
    for x in inputs_of(shape, block, TOKENS, count):
        with torch.no_grad():
            place.copy_(x)
        graph.replay()
        plain = step(x.requires_grad_(training), dy)
        wrong += not all(torch.equal(a, b) for a, b in zip(out, plain, strict=True))
    return wrong


def differing(shape: Shape, block: Any, tokens: int, count: int, mode: str) -> int:
    """Of how many inputs a kept graph gave another result than the artifact called directly."""
    run = moec.compile(block, mode=mode)
    wrong = 0
    with torch.no_grad():
        for x in inputs_of(shape, block, tokens, count):
            y = run(x)
            artifact = moec.regions(run)[0].artifacts[0]
            if artifact.few is not None and tokens <= artifact.few_tokens:
                artifact = artifact.few.get([]) or artifact
            steady = next(iter(moec.regions(run)[0].steady.values()))
            plain = artifact.forward(x[0], *steady.weights)[0][0]
            away = float((y[0].float() - plain.float()).norm() / plain.float().norm())
            # in more rows a library product may add in another order
            wrong += away > (0.0 if mode == "default" else 0.05)
    return wrong


def main() -> None:
    """Check and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    names = [n for n in SHAPES if n != "tiny"]
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--routings", type=int, default=100)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print(describe(environment("cuda")), flush=True)
    rows, header = [], ("model", "without syncs", "inference", "training", "few", "reduced")
    for name in options.only:
        shape = SHAPES[name]
        block = random_block(shape, "cuda", torch.bfloat16)
        x = torch.randn(1, TOKENS, shape.hidden, device="cuda").bfloat16()
        rows.append(
            (
                name,
                without_syncs(block, x),
                str(replayed(shape, block, options.routings, training=False)),
                str(replayed(shape, block, options.routings, training=True)),
                str(differing(shape, block, 7, options.routings, "default")),
                str(differing(shape, block, 100, options.routings, "reduce-overhead")),
            )
        )
        torch.cuda.empty_cache()
    print(markdown_table(header, rows))


if __name__ == "__main__":
    main()
