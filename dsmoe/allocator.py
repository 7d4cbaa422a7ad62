"""Freed host memory stays with the process.

By default the C library returns every large block to Linux when it is freed and asks for it anew a moment later; Linux
then hands out zeroed pages one by one. A training step on CPU, which frees and allocates gigabytes of activations,
spends much of its time on that.
"""

import ctypes
import os
import sys

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGE, _LARGEST_OF_OLD_VERSIONS = 1 << 30, 32 << 20
# what people set who know better
_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed blocks below 1 GB for the next allocation; for commands that compute on CPU.

    Not a bit of any result changes. The peak of memory rises, since blocks of one size leave holes for
    another: who lacks memory sets MALLOC_TRIM_THRESHOLD_=131072, glibc's own default, and nothing is done here.

    Returns:
        Whether it was done: not where malloc is another library's, nor where the environment sets glibc's thresholds.
    """
    if not sys.platform.startswith("linux") or any(name in os.environ for name in _SETTINGS):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    large = any(mallopt(_M_MMAP_THRESHOLD, size) for size in (_LARGE, _LARGEST_OF_OLD_VERSIONS))
    # -1: never return the top of the heap
    return large and bool(mallopt(_M_TRIM_THRESHOLD, -1))
