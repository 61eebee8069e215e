# mypy: ignore-errors
"""What Gluon calls its operations in the versions of Triton that modules in Gluon can run on."""

from triton.experimental.gluon.language._core import shared_memory_descriptor
from triton.experimental.gluon.language.nvidia.hopper import async_copy, tma

copy_block = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store_block = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
copy_rows = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
arrive_copied = async_copy.mbarrier_arrive
see_as = (
    getattr(shared_memory_descriptor, "reinterpret", None) or shared_memory_descriptor._reinterpret
)
