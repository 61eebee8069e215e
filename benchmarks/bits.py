"""A number for the bits of a tensor, so that results can be compared without being kept."""

import torch

WORDS = 1 << 26  # that are looked at together


def bits_of(tensor: torch.Tensor) -> int:
    """A number that changes with any bit of a tensor: a sum of its 16-bit words, each times an odd
    number of its place, modulo 2**64.
    """
    words, total = tensor.detach().contiguous().view(-1).view(torch.int16), 0
    for start in range(0, len(words), WORDS):
        some = words[start : start + WORDS].long()
        odd = torch.arange(start, start + len(some), device=some.device) * 2 + 1
        total += int((some * odd).sum())
    return total % 2**64
