"""Code generation: from fused IR to an importable Python module of kernels."""
