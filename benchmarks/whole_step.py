"""A whole training step of a decoder of OLMoE's shape: tokens a second, memory, and the loss.

Run from the project's root:

    python -m benchmarks.whole_step --batch 1 --json out/whole_step.json
    python -m benchmarks.whole_step --batch 1 --losses 200          loss curves over 200 steps, too
    python -m benchmarks.whole_step --small --device cpu            the script at work, anywhere

How it is measured. The model is transformers' own OLMoE with random weights in bf16 (16 layers, 64
experts of which 8 are chosen), and sequences of 4096 tokens; attention is PyTorch's. A step is
forward, backward and the optimizer (`--optimizer`: the same for all, fused on a GPU), without an
auxiliary loss. `--profile` adds what the GPU was busy with in one step. Every implementation has a
process of its own with a time limit, the same weights and the same batches, a few in turns, so that
the loss falls. Times are medians of `--steps` steps after the first ones, which compile; a peak is
of the whole process, parameters and optimizer included. Losses are compared step by step with those
of the last one asked for (eager, by default): the largest relative difference, beside which
grouped_mm's says what another order of rounding does.
"""

import argparse
import itertools
import json
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import DeviceType
from transformers import AutoModelForCausalLM, OlmoeConfig

import moec

from .report import describe, environment, markdown_table, write_json

WARM_UP = 4
BATCHES = 8  # that come in turns
HEADER = (
    *("implementation", "ms a step", "tokens/s", "against the best other", "peak GiB"),
    *("last loss", "from the last row's, at most"),
)
SIZES = {
    False: {"hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16}
    | {"num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 50304}
    | {"num_experts": 64, "num_experts_per_tok": 8, "max_position_embeddings": 4096},
    True: {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2}
    | {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 256}
    | {"num_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 128},
}
# what kernels are for -> in their names; the first that fits
KINDS = {
    "optimizer": r"multi_tensor_apply|FusedAdam",
    "attention": r"flash|fmha|cudnn",
    "moec's experts": r"^(experts_|mlp_|scan_counts|place_pairs|list_row|write_row)",
    "experts of grouped_mm": r"GroupProblemShape|grouped",
    "dense products": r"nvjet|cublas|gemm|splitKreduce|cutlass",
    "Inductor's kernels": r"^triton_",
    "copies": r"Memcpy|Memset|copy_kernel",
}
# name -> transformers' implementation of the experts, and what is made of the model
IMPLEMENTATIONS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "moec": ("eager", moec.compile),
    "moec, scope model": ("eager", lambda model: moec.compile(model, scope="model")),
    "grouped_mm": ("grouped_mm", lambda model: model),
    "grouped_mm + torch.compile": ("grouped_mm", torch.compile),
    "eager": ("eager", lambda model: model),
}


# one implementation
def make_model(small: bool, experts: str, device: str) -> Any:
    """The model with random weights, the same for every implementation of the experts."""
    torch.manual_seed(0)
    config = OlmoeConfig(**SIZES[small], use_cache=False, eos_token_id=None, pad_token_id=None)
    config._attn_implementation = "sdpa"
    with torch.device(device):
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.config._experts_implementation = experts
    return model.train()


def batches(arguments: argparse.Namespace) -> Iterator[Tensor]:
    """Random tokens [batch, length], a few batches in turns."""
    generator = torch.Generator().manual_seed(1)
    vocabulary = SIZES[arguments.small]["vocab_size"]
    shape = (BATCHES, arguments.batch, arguments.length)
    tokens = torch.randint(vocabulary, shape, generator=generator).to(arguments.device)
    return itertools.cycle(tokens)


def make_optimizer(name: str, model: Any, device: str) -> torch.optim.Optimizer:
    """AdamW or SGD."""
    fused = device == "cuda"
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), lr=1e-2, fused=fused)
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=fused)


def steps(arguments: argparse.Namespace, name: str) -> Iterator[tuple[float, Tensor]]:
    """Seconds and loss of one step after the other."""
    experts, make = IMPLEMENTATIONS[name]
    model = make_model(arguments.small, experts, arguments.device)
    optimizer = make_optimizer(arguments.optimizer, model, arguments.device)
    run = make(model)
    for tokens in batches(arguments):
        start = time.perf_counter()
        loss = run(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if arguments.device == "cuda":
            torch.cuda.synchronize()
        yield time.perf_counter() - start, loss.detach()


def worker(arguments: argparse.Namespace) -> None:
    """Measure one implementation; print its figures once they are there, and again with losses."""
    signal.alarm(arguments.limit)  # ends the process, whatever it is stuck in
    least, seconds, losses = WARM_UP + arguments.steps, list[float](), list[float]()
    found = steps(arguments, arguments.worker)
    for took, loss in itertools.islice(found, max(least, arguments.losses)):
        seconds.append(took)
        losses.append(float(loss))
        if len(losses) == least or len(losses) % 20 == 0:
            print(json.dumps(figures(arguments, seconds, losses)), flush=True)
    last = figures(arguments, seconds, losses)
    if arguments.profile:
        last["kernels"] = profiled(found)
    print(json.dumps(last), flush=True)


def profiled(found: Iterator[Any]) -> dict[str, float]:
    """Milliseconds of one step by what its kernels are for."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        next(found)
    times: dict[str, float] = {}
    for event in profiler.key_averages():
        if event.device_type == DeviceType.CUDA:
            kind = kind_of(event.key)
            times[kind] = times.get(kind, 0.0) + 1e-3 * event.self_device_time_total
    return dict(sorted(times.items(), key=lambda item: -item[1]))


def kind_of(kernel: str) -> str:
    """What a kernel is for, by its name; a name that says nothing is its own kind."""
    return next((kind for kind, form in KINDS.items() if re.search(form, kernel)), kernel[:60])


def figures(
    arguments: argparse.Namespace, seconds: list[float], losses: list[float]
) -> dict[str, Any]:
    """What is known of an implementation by now."""
    median = statistics.median(seconds[WARM_UP:] or seconds)
    row: dict[str, Any] = {"implementation": arguments.worker, "ms": 1e3 * median}
    row |= {"tokens_per_second": arguments.batch * arguments.length / median, "losses": losses}
    if arguments.device == "cuda":
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return row


# all of them
def measured(arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    """The row of an implementation, measured in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.whole_step", "--worker", name]
    for option in ("device", "batch", "length", "steps", "losses", "limit", "optimizer"):
        command += [f"--{option}", str(getattr(arguments, option))]
    command += [f"--{flag}" for flag in ("small", "profile") if getattr(arguments, flag)]
    ended, error = "", ""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=arguments.limit + 60, check=False
        )
        output, error = done.stdout, done.stderr
        ended = f"stopped after {arguments.limit} s" if done.returncode == -signal.SIGALRM else ""
    except subprocess.TimeoutExpired as late:
        output = late.stdout.decode() if isinstance(late.stdout, bytes) else ""
        ended = f"stopped after {arguments.limit + 60} s"
    return read_row(name, output, ended or (error.strip().splitlines() or ["no output"])[-1][:160])


def read_row(name: str, output: str, ended: str) -> dict[str, Any]:
    """The last figures that a process printed; how it ended, if there are none."""
    for line in reversed(output.splitlines()):
        if line.startswith("{") and line.endswith("}"):
            found: dict[str, Any] = json.loads(line)
            return found | ({"ended": ended} if ended.startswith("stopped") else {})
    return {"implementation": name, "failed": ended}


def compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with the largest relative difference of a loss to the last row's at its step."""
    expected = rows[-1].get("losses", [])
    return [r | _difference(r.get("losses", []), expected) for r in rows]


def _difference(losses: list[float], expected: list[float]) -> dict[str, Any]:
    pairs = list(zip(losses, expected, strict=False))
    if not pairs:
        return {}
    worst = max(abs(a - b) / abs(b) for a, b in pairs)
    return {"from_last": worst, "steps_compared": len(pairs)}


def cells(row: dict[str, Any], rows: list[dict[str, Any]]) -> tuple[str, ...]:
    """A row of figures as text."""
    if "failed" in row:
        return (f"{row['implementation']}: {row['failed']}", *["-"] * (len(HEADER) - 1))
    others = [
        r["tokens_per_second"]
        for r in rows
        if "moec" not in r["implementation"] and r is not row and "failed" not in r
    ]
    ratio = f"{row['tokens_per_second'] / max(others):.2f}" if others else "-"
    peak = f"{row['peak_gib']:.1f}" if "peak_gib" in row else "-"
    name = row["implementation"] + (f" ({row['ended']})" if "ended" in row else "")
    loss = f"{row['losses'][-1]:.4f} ({len(row['losses'])} steps)"
    apart = "-"
    if "from_last" in row:
        apart = f"{row['from_last']:.1e} ({row['steps_compared']} steps)"
    speed = (f"{row['ms']:.1f}", f"{row['tokens_per_second']:.0f}", ratio)
    return (name, *speed, peak, loss, apart)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS)
    parser.add_argument("--batch", type=int, default=1, help="sequences a step")
    parser.add_argument("--length", type=int, help="tokens of a sequence (4096; --small: 64)")
    parser.add_argument("--steps", type=int, default=10, help="that are timed")
    parser.add_argument("--losses", type=int, default=0, help="steps whose losses are compared")
    parser.add_argument("--optimizer", choices=("adamw", "sgd"), default="adamw")
    parser.add_argument("--limit", type=int, default=300, help="seconds of an implementation")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="2 small layers")
    parser.add_argument("--profile", action="store_true", help="what the GPU is busy with")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here; --small --device cpu shows the script at work")
    arguments.length = arguments.length or (64 if arguments.small else 4096)
    arguments.implementations = arguments.implementations or [*IMPLEMENTATIONS]
    return arguments


def main() -> None:
    """Measure and print."""
    arguments = parse_arguments()
    if arguments.worker:
        worker(arguments)
        return
    facts: dict[str, Any] = environment(arguments.device)
    print(describe(facts), flush=True)
    asked = {n: getattr(arguments, n) for n in ("batch", "length", "optimizer", "steps", "small")}
    rows: list[dict[str, Any]] = []
    for name in arguments.implementations:
        rows = compared([*rows, measured(arguments, name)])
        write_json(arguments.json, {"environment": facts, "asked": asked, "rows": rows})
        print(" ".join(cells(rows[-1], rows)), flush=True)
        for kind, milliseconds in rows[-1].get("kernels", {}).items():
            if milliseconds >= 0.2:
                print(f"    {milliseconds:7.2f} ms  {kind}", flush=True)
    print(f"\n{markdown_table(HEADER, [cells(row, rows) for row in rows])}")


if __name__ == "__main__":
    main()
