"""One MoE block in float64, forward and backward, written for being right: expert by expert.

Of the weights' gradients only a few experts' are kept, so that the largest block fits a GPU.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Weights:
    """A block's parameters: router [E, H], gate_up [E, 2I, H] (gate first), down [E, H, I]."""

    router: Tensor
    gate_up: Tensor
    down: Tensor


@dataclass
class Result:
    """Output and gradients in float64; `gate_up` and `down` by expert."""

    output: Tensor
    hidden: Tensor
    router: Tensor = field(default_factory=lambda: torch.empty(0))
    gate_up: dict[int, Tensor] = field(default_factory=dict)
    down: dict[int, Tensor] = field(default_factory=dict)


@dataclass
class Routing:
    """Scores f64[T, K] still attached to `hidden` and `router`, and experts i64[T, K]."""

    hidden: Tensor
    router: Tensor
    scores: Tensor
    experts: Tensor


def route(weights: Weights, hidden: Tensor, top_k: int, normalise: bool) -> Routing:
    """Softmax over all experts, then the top K, as OLMoE, Qwen3 and Mixtral define it."""
    leaf = hidden.double().requires_grad_()
    router = weights.router.detach().double().requires_grad_()
    probabilities = (leaf @ router.T).softmax(-1)
    scores, experts = probabilities.topk(top_k)
    if normalise:
        scores = scores / scores.sum(-1, keepdim=True)
    return Routing(leaf, router, scores, experts)


def reference(
    weights: Weights,
    hidden: Tensor,
    gradient: Tensor,
    *,
    top_k: int,
    normalise: bool,
    activation: Callable[[Tensor], Tensor],
    kept: set[int],
) -> Result:
    """Output [T, H] and gradients, for the loss sum(output * gradient)."""
    routing = route(weights, hidden, top_k, normalise)
    result = Result(torch.zeros_like(routing.hidden), torch.zeros_like(routing.hidden))
    score_gradient = torch.zeros_like(routing.scores)
    for expert in range(len(weights.router)):
        tokens, slots = torch.where(routing.experts == expert)
        leaves = [
            tensor.detach().double().requires_grad_()
            for tensor in (
                hidden[tokens],
                routing.scores[tokens, slots],
                weights.gate_up[expert],
                weights.down[expert],
            )
        ]
        output = one_expert(activation, *leaves)
        grads = torch.autograd.grad(output, leaves, gradient[tokens].double())
        result.output.index_add_(0, tokens, output.detach())
        result.hidden.index_add_(0, tokens, grads[0])
        score_gradient[tokens, slots] = grads[1]
        if expert in kept:
            result.gate_up[expert], result.down[expert] = grads[2], grads[3]
    through_router = torch.autograd.grad(
        routing.scores, [routing.hidden, routing.router], score_gradient
    )
    result.hidden += through_router[0]
    result.router = through_router[1]
    result.output, result.hidden = result.output.detach(), result.hidden.detach()
    return result


def one_expert(
    activation: Callable[[Tensor], Tensor],
    rows: Tensor,
    scores: Tensor,
    gate_up: Tensor,
    down: Tensor,
) -> Tensor:
    """The weighted output of one gated expert for its rows."""
    gate, up = (rows @ gate_up.T).chunk(2, -1)
    return (activation(gate) * up) @ down.T * scores[:, None]


def clear_choices(router: Tensor, candidates: Tensor, top_k: int, margin: float) -> Tensor:
    """The candidates whose K-th and next expert differ by more than `margin` in the logit.

    With these, rounding cannot change the routing, so errors tell of arithmetic alone.
    """
    logits = candidates.double() @ router.double().T
    best = logits.topk(min(top_k + 1, len(router))).values
    return candidates[best[:, top_k - 1] - best[:, -1] > margin]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The norm of the difference over the norm of the expected tensor."""
    difference = torch.linalg.vector_norm(actual.detach().double() - expected)
    return float(difference / torch.linalg.vector_norm(expected))
