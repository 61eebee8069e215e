"""The interpreter itself: on, and exact on a kernel with a mask."""

import torch
import triton
import triton.language as tl


@triton.jit
def double_kernel(source, target, length, block: tl.constexpr):
    """target[i] = 2 * source[i]"""
    at = tl.program_id(0) * block + tl.arange(0, block)
    inside = at < length
    tl.store(target + at, 2 * tl.load(source + at, mask=inside), mask=inside)


def test_kernels_run_without_a_gpu() -> None:
    source = torch.arange(5, dtype=torch.float32)
    target = torch.full((6,), torch.nan)
    double_kernel[(2,)](source, target, 5, block=4)
    assert target[:5].tolist() == [0, 2, 4, 6, 8]
    assert target[5].isnan()
