"""Products for Hopper in Gluon: warps that load, and warps that multiply.

A program stays on its processor and takes tile after tile. One group of warps fills stages of
shared memory, by the copy engine or, where rows are gathered, by asynchronous copies of each row;
two groups of four warps multiply half of a tile's rows each and work on their half of the result,
while the stages of the next tile fill. The work on the result is generated from the kernel's body,
as in :mod:`moec.codegen.triton`, whose other kernels stand beside these in one module.
"""
