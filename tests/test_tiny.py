"""Five seconds that tell whether moec works at all: compile one block, compare it with itself."""

import pytest
import torch
from transformers import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

import moec


def tiny_block() -> OlmoeSparseMoeBlock:
    """One OLMoE block of four experts, two per token, with routing that is not uniform."""
    config = OlmoeConfig(hidden_size=16, intermediate_size=8, num_experts=4, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    block = OlmoeSparseMoeBlock(config)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return block


def output_and_gradients(
    block: torch.nn.Module, hidden: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The block's output, and the gradients of input and parameters of a loss with no symmetry."""
    hidden = hidden.clone().requires_grad_()
    output = block(hidden)
    loss = (output * torch.arange(output.numel()).view_as(output).sin()).sum()
    return output, list(torch.autograd.grad(loss, [hidden, *block.parameters()]))


@pytest.mark.parametrize("tokens", [1, 2, 7, 33])
def test_compiled_block_equals_eager(tokens: int) -> None:
    block = tiny_block()
    compiled = moec.compile(block)
    hidden = torch.randn(1, tokens, 16)
    expected, expected_gradients = output_and_gradients(block, hidden)
    actual, actual_gradients = output_and_gradients(compiled, hidden)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(actual_gradients, expected_gradients, rtol=1e-5, atol=1e-6)


def test_parameters_are_shared() -> None:
    block = tiny_block()
    compiled = moec.compile(block)
    for name, parameter in block.named_parameters():
        assert compiled.get_parameter(name) is parameter
    assert list(compiled.state_dict()) == list(block.state_dict())
