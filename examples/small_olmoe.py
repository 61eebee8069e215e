"""A small OLMoE language model on public-domain text, set up three ways to be trained side by side.

The demo (`examples/train_olmoe.py`) and the CPU benchmark (`benchmarks/cpu_step.py`) share this.
"""

import contextlib
import copy
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import OlmoeConfig, OlmoeForCausalLM

import moec

DATA = Path(__file__).parent / "data"
BATCH = 4
LENGTH = 256
# AdamW divides a gradient by its own size plus this. With the default 1e-8 a gradient that is
# nothing but rounding noise (an expert with hardly a token) becomes a full step in a random
# direction, and two exact implementations part ways within some tens of steps.
ADAM_EPSILON = 1e-6
# The text is ASCII, so a token is a byte.
VOCABULARY = 128
# 26 million parameters, 25 of them in experts: small enough for two cores, and yet about seven
# tenths of a training step is spent in the MoE blocks.
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts": 32,
    "num_experts_per_tok": 8,
    "max_position_embeddings": LENGTH,
}


def build_model(seed: int = 0) -> OlmoeForCausalLM:
    """An OLMoE language model with random weights, the same for the same seed."""
    torch.manual_seed(seed)
    tokens = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    return OlmoeForCausalLM(OlmoeConfig(**SHAPE, **tokens))


def read_text() -> torch.Tensor:
    """The bundled texts, one after the other, as int64 tokens."""
    text = b"\n\n".join(path.read_bytes() for path in sorted(DATA.glob("*.txt")))
    return torch.tensor(list(text), dtype=torch.int64)


def batches(count: int, seed: int = 0) -> Iterator[torch.Tensor]:
    """`count` batches of int64[BATCH, LENGTH]: windows of the text at random places."""
    text = read_text()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        starts = torch.randint(len(text) - LENGTH, (BATCH,), generator=generator)
        yield torch.stack([text[start : start + LENGTH] for start in starts.tolist()])


class Trainee:
    """One model with its own optimizer, and the record of its steps (loss; seconds)."""

    def __init__(self, name: str, model: torch.nn.Module) -> None:
        self.name = name
        self.model = model.train()
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=1e-3, eps=ADAM_EPSILON, fused=True
        )
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self, batch: torch.Tensor) -> None:
        """One training step: forward, backward, AdamW."""
        start = time.perf_counter()
        loss = self.model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss.item())

    def peak_bytes(self, batch: torch.Tensor) -> int:
        """What one more step allocates at its highest, above parameters and optimizer state.

        Counted from the CPU allocator's own events, so temporaries inside ATen count too.
        The step is not recorded.
        """
        with (
            quiet_stderr(),
            profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
        ):
            self.step(batch)
        del self.losses[-1], self.seconds[-1]
        held = peak = 0
        for change in allocations(profiler):
            held += change
            peak = max(peak, held)
        return peak


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """Send the process's stderr nowhere: the profiler's C++ part announces itself there."""
    sys.stderr.flush()
    saved = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def allocations(profiler: profile) -> list[int]:
    """The bytes allocated (positive) and freed (negative), in order of time."""
    recorded: Any = profiler.profiler  # typed in part only
    recorded = recorded.kineto_results.events()
    events = [event for event in recorded if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def make_trainees(seed: int = 0, options: dict[str, Any] | None = None) -> list[Trainee]:
    """The same initial weights three times: eager experts, grouped_mm, and compiled by moec.

    `options` are those of `moec.compile`.
    """
    model = build_model(seed)
    trainees = []
    for implementation in ("eager", "grouped_mm"):
        twin = copy.deepcopy(model)
        twin.set_experts_implementation(implementation)
        trainees.append(Trainee(implementation, twin))
    trainees.append(Trainee("moec", moec.compile(model, options=options)))
    return trainees


def train_together(trainees: list[Trainee], stream: Iterator[torch.Tensor]) -> Iterator[int]:
    """Train all on the same batches, a step each in turn; yields the number of steps done.

    Turns rotate, so that noise of the machine and warm caches favour nobody.
    """
    for done, batch in enumerate(stream):
        for turn in range(len(trainees)):
            trainees[(done + turn) % len(trainees)].step(batch)
        yield done + 1


def worst_difference(losses: list[float], reference: list[float]) -> float:
    """The largest relative difference between two loss curves."""
    pairs = zip(losses, reference, strict=True)
    return max(abs(loss - expected) / abs(expected) for loss, expected in pairs)
