"""Where the memory goes: weights, activations and KV.

`size` decides how many KV blocks there will be. When nothing fits, the error shows the same table and the flag that
would make it fit.
"""

from __future__ import annotations

import ctypes
import gc
from contextlib import suppress

import psutil

from headrace.core.config import Bytes, format_bytes
from headrace.core.facts import Memory
from headrace.core.shape import ModelShape
from headrace.core.types import HeadraceError
from headrace.device import kvstore

_CPU_SHARE = 0.5  # of what is free after loading: the machine has other work to do
_CUDA_SHARE = 0.9


class DoesNotFit(HeadraceError):
    """Not enough memory for one request of useful length; the message has the table and the remedy."""


def size(
    shape: ModelShape, *, weights: int, activations: int, block_tokens: int, max_context_tokens: int,
    wanted: Bytes | None, itemsize: int, device: str, max_running: int,
) -> Memory:  # fmt: skip
    """How much KV there will be: `wanted`, or a share of what is free, but never more than `max_running` requests of
    full length could use; `itemsize` is that of a stored number. Raises DoesNotFit when one request of full length
    would not fit."""
    free = free_bytes(device)
    block_bytes = kvstore.block_bytes(shape, block_tokens, itemsize)
    per_request = -(-max_context_tokens // block_tokens) * block_bytes
    share = _CPU_SHARE if device == "cpu" else _CUDA_SHARE
    affordable = max(0, int(share * (free - activations)))
    kv = min(wanted if wanted is not None else affordable, max_running * per_request)
    kv -= kv % block_bytes
    memory = Memory(weights, activations, kv, free, block_bytes, block_tokens, max_context_tokens)
    if kv < per_request:
        raise DoesNotFit(_too_small(memory, per_request))
    if kv + activations > free:
        most = format_bytes(max(0, free - activations))
        raise DoesNotFit(
            f"{format_bytes(kv)} of KV do not fit; after the weights at most {most} are left.\n{memory.table()}\n"
            f"Start with --kv-memory {_as_flag(affordable)}."
        )
    return memory


def give_back() -> None:
    """Return to the system what was freed and is only kept for a next time."""
    gc.collect()
    with suppress(OSError, AttributeError):  # a C library without it
        ctypes.CDLL(None).malloc_trim(0)


def host_blocks(wanted: int, block_bytes: int) -> int:
    """Blocks of a host tier of so many bytes. Raises DoesNotFit for more memory than the host has, or less than one."""
    free = free_bytes("cpu")
    if not block_bytes <= wanted <= free:
        room = f"from {format_bytes(block_bytes)}, one block, to {format_bytes(free)}, which are free"
        raise DoesNotFit(f"a host tier of {format_bytes(wanted)} cannot be; give --host-kv-memory {room}")
    return wanted // block_bytes


def free_bytes(device: str) -> int:
    """Memory that could be allocated now."""
    if device == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


def _too_small(memory: Memory, per_request: int) -> str:
    fitting = memory.tokens
    remedies = [f"--kv-memory {_as_flag(per_request + memory.block_bytes)}"]
    if fitting >= memory.block_tokens:
        remedies.insert(0, f"--max-context {fitting}")
    return (
        f"one request of {memory.max_context_tokens:,} tokens needs {format_bytes(per_request)} of KV.\n"
        f"{memory.table()}\nStart with {' or '.join(remedies)}."
    )


def _as_flag(count: int) -> str:
    return f"{-(-count // 2**20)}MiB"
