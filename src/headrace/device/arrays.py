"""Arrays as files hold them and as native code reads them: numpy, so that nothing has to be imported that takes
seconds. numpy has no bfloat16: an array of uint16 is one of bfloat16 everywhere in this room."""

from __future__ import annotations

import mmap
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

BF16 = np.dtype("<u2")
_ALIGNED = 64  # bytes: a cache line, and the widest vector
_LARGE_PAGE, _FIRST, _ARENA = 2 << 20, 4 << 20, 64 << 20  # bytes
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}


def floats(array: np.ndarray) -> np.ndarray:
    """The same numbers as float32, exactly; an array that is float32 already is returned as it is."""
    if array.dtype == BF16:
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32, copy=False)


class Arena:
    """Memory for arrays that stay, one behind the other, in large pages where the kernel gives them: whoever reads all
    of it in every step looks up fewer addresses. The first megabytes lie in ordinary ones, so a tiny model is tiny."""

    __slots__ = ("_used", "_whole")

    def __init__(self) -> None:
        self._whole = np.empty(0, np.uint8)
        self._used = 0

    def empty(self, count: int) -> np.ndarray:
        """uint8 [count] at the start of a cache line. What is never written takes no memory."""
        if self._used + count > len(self._whole):
            first = not len(self._whole)
            size = max(-(-count // _LARGE_PAGE) * _LARGE_PAGE, _FIRST if first else _ARENA)
            pages = mmap.mmap(-1, size + _LARGE_PAGE, **_PRIVATE)
            if size > _FIRST and hasattr(mmap, "MADV_HUGEPAGE"):
                with suppress(OSError):  # a kernel without them
                    pages.madvise(mmap.MADV_HUGEPAGE)
            whole = np.frombuffer(pages, np.uint8)
            start = -whole.ctypes.data % _LARGE_PAGE
            self._whole, self._used = whole[start : start + size], 0
        begin = self._used
        self._used += -(-count // _ALIGNED) * _ALIGNED
        return self._whole[begin : begin + count]


def as_tensor(array: np.ndarray) -> Tensor:
    """The same memory for torch."""
    import torch

    tensor = torch.from_numpy(array if array.flags.writeable else array.copy())
    return tensor.view(torch.bfloat16) if array.dtype == BF16 else tensor
