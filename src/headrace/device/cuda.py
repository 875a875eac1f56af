"""Whether there is a CUDA device: asked of the driver, so that nobody waits for torch who does not need it."""

from __future__ import annotations

import ctypes
import sys
from functools import cache

_DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"


@cache
def present() -> bool:
    """True where torch can use one as well."""
    try:
        driver = ctypes.CDLL(_DRIVER)
        count = ctypes.c_int(0)
        if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
            return False
    except (OSError, AttributeError):
        return False
    import torch

    return torch.cuda.is_available()
