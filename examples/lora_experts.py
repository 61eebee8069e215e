"""Train adapters on the experts of a small OLMoE model, by PEFT alone and compiled by moec.

Run from the project's root: `python -m examples.lora_experts`. It prints the losses side by side
and the largest tensor that a step of each makes. Exit status 1: the losses differ, or the compiled
model made a tensor as large as one of the experts' weights.
"""

import sys
import warnings
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from transformers import OlmoeConfig, OlmoeForCausalLM

import moec

STEPS, BATCH, LENGTH, VOCABULARY = 8, 2, 24, 128
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
TOLERANCE = 1e-4


def small_olmoe() -> Any:
    """Two layers of sixteen experts, with random weights: the same at each call."""
    torch.manual_seed(0)
    config = OlmoeConfig(
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=16,
        num_experts_per_tok=2,
        vocab_size=VOCABULARY,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return OlmoeForCausalLM(config)


def with_adapters(model: Any) -> Any:
    """The model in PEFT's wrapper, with an adapter of rank 8 on every expert."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks for a property's old name
        torch.manual_seed(1)
        return get_peft_model(model, LoraConfig(r=8, target_modules=[], target_parameters=EXPERTS))


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While entered, notes the bytes of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_memory(t) for t in _tensors((args, kwargs))}
        results = func(*args, **(kwargs or {}))
        made = [t.nbytes for t in _tensors(results) if _memory(t) not in given]
        self.bytes = max([self.bytes, *made])
        return results


def _tensors(values: Any) -> list[torch.Tensor]:
    return [v for v in tree_flatten(values)[0] if isinstance(v, torch.Tensor)]


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def train(model: Any) -> tuple[list[float], int]:
    """The losses of some steps, and the bytes of the largest tensor that the last one made."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    ids = torch.randint(3, VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        with Largest() as largest:
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    return losses, largest.bytes


def main() -> int:
    """Train both and print; the exit status."""
    plain = with_adapters(small_olmoe())
    compiled = with_adapters(moec.compile(small_olmoe()))  # or compile what has adapters
    experts = plain.get_base_model().model.layers[0].mlp.experts.get_base_layer()
    weight = min(p.nbytes for p in experts.parameters())
    (expected, before), (losses, after) = train(plain), train(compiled)
    print("step  peft      moec")
    for step, (a, b) in enumerate(zip(expected, losses, strict=True), 1):
        print(f"{step:4}  {a:.6f}  {b:.6f}")
    print(f"smaller of the two stacked weights  {weight // 1024} KiB")
    print(f"largest tensor of a step, peft      {before // 1024} KiB")
    print(f"largest tensor of a step, moec      {after // 1024} KiB")
    same = all(abs(a - b) <= TOLERANCE * abs(a) for a, b in zip(expected, losses, strict=True))
    return 0 if same and after < weight else 1


if __name__ == "__main__":
    sys.exit(main())
