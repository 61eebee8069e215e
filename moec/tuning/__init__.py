"""Tiles of kernels: which are possible, which should be fast, which were measured to be."""
