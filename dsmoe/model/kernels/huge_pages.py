"""Memory in pages of 2 MB, where Linux grants them.

Attention over long contexts reads all keys and values once a token. In pages of 4 KB a core waits for the page
table every 64 cache lines.
"""

import ctypes
import sys

from torch import Tensor

_PAGE = 2 << 20
_MADV_HUGEPAGE = 14


def use_huge_pages(tensor: Tensor) -> None:
    """Ask for pages of 2 MB for the memory of a tensor, where it covers whole ones; where that fails, nothing changes.

    Args:
        tensor: on CPU, contiguous, fresh: pages that were written before stay as they are.
    """
    first = -(-tensor.data_ptr() // _PAGE) * _PAGE
    last = (tensor.data_ptr() + tensor.nbytes) // _PAGE * _PAGE
    if first < last and sys.platform.startswith("linux"):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _MADV_HUGEPAGE)
