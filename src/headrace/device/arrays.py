"""Arrays as files hold them and as native code reads them: numpy, so that nothing has to be imported that takes
seconds. numpy has no bfloat16: an array of uint16 is one of bfloat16 everywhere in this room."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

BF16 = np.dtype("<u2")
_ALIGNED = 64  # bytes: a cache line, and the widest vector


def floats(array: np.ndarray) -> np.ndarray:
    """The same numbers as float32, exactly; an array that is float32 already is returned as it is."""
    if array.dtype == BF16:
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32, copy=False)


def empty_bytes(count: int) -> np.ndarray:
    """uint8 [count], not initialised, at the start of a cache line."""
    memory = np.empty(count + _ALIGNED, dtype=np.uint8)
    start = -memory.ctypes.data % _ALIGNED
    return memory[start : start + count]


def as_tensor(array: np.ndarray) -> Tensor:
    """The same memory for torch."""
    import torch

    tensor = torch.from_numpy(array if array.flags.writeable else array.copy())
    return tensor.view(torch.bfloat16) if array.dtype == BF16 else tensor
