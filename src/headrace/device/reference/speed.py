"""Measures what this machine can do at most: bytes read a second, and multiplications a second by precision.

A limit is what nothing exceeds, so of several kernels and sizes the fastest counts, and of several rounds the best.
Knows nothing of models. Owns what it measures with while it measures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import psutil
import torch
from torch.nn import functional

from headrace.core.clock import perf
from headrace.core.config import DeviceSettings
from headrace.device.executor import one_thread
from headrace.device.load import device_of
from headrace.device.reference.linear import can_pack

Call = Callable[[], object]
Product = tuple[int, int, int]  # rows, inputs, outputs

PRECISIONS = ("fp32", "bf16", "int8")
_PRODUCTS: tuple[Product, ...] = ((128, 512, 512), (512, 1536, 1536), (1024, 1024, 1024), (1024, 4096, 1024))
_MEMORY_BYTES = 512 << 20  # far more than any cache holds
_CACHE_BYTES = 4 << 20  # that a cache shared by the cores surely holds
_FREE_SHARE = 0.25  # of the free memory that measuring may use
_REPEATS, _LEAST_S = 4, 0.02
_LONG_S, _SLOW_S = 0.05, 0.5  # a product, a call


@dataclass(frozen=True, slots=True)
class Speed:
    """The most this machine was seen doing."""

    device: str  # "cpu" or "cuda"
    threads: int
    memory_bytes: float  # it has
    memory_bytes_per_s: float  # read from memory
    cache_bytes_per_s: float  # read over and over from an array of 4 MiB
    flops_per_s: Mapping[str, float]  # by precision, a multiplication and an addition being two; 0: it cannot


def measure(settings: DeviceSettings, heard: Callable[[str], None] = lambda _: None) -> Speed:
    """Some seconds of the device and the threads that `settings` name; `heard` is told what begins. Measures on a
    thread that ends with it: torch keeps a team of compute threads for every thread that calls it."""
    thread = one_thread()
    try:
        return thread.submit(_measure, settings, heard).result()
    finally:
        thread.shutdown()


@torch.inference_mode()
def _measure(settings: DeviceSettings, heard: Callable[[str], None]) -> Speed:
    device = torch.device(device_of(settings))
    if settings.threads:
        torch.set_num_threads(settings.threads)
    heard("measure how fast memory is read")
    total, free = _memory(device)
    far, near = (_read(size, device) for size in (min(_MEMORY_BYTES, int(free * _FREE_SHARE)), _CACHE_BYTES))
    flops = {}
    for precision in PRECISIONS:
        heard(f"measure multiplying in {precision}")
        flops[precision] = max(_rate(kernel, device) for kernel in _KERNELS[precision])
    return Speed(device.type, torch.get_num_threads(), total, far, near, flops)


def _memory(device: torch.device) -> tuple[float, float]:
    """Bytes of the device: in all, free."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total, free
    memory = psutil.virtual_memory()
    return memory.total, memory.available


def _read(nbytes: int, device: torch.device) -> float:
    """Bytes a second of kernels that read and write next to nothing."""
    values = torch.ones(max(1, nbytes // 4), dtype=torch.float32, device=device)
    calls: tuple[Call, ...] = (values.sum, values.amax, lambda: torch.dot(values, values))
    return max(values.nbytes / _seconds(call, device) for call in calls)


def _rate(kernel: Callable[[Product, torch.device], Iterator[Call]], device: torch.device) -> float:
    """Operations a second of one kernel at its best; 0 where there is none. What is slow at a small product is not
    asked for a large one."""
    fastest = 0.0
    for rows, inputs, outputs in _PRODUCTS:
        try:
            seconds = min((_seconds(call, device) for call in kernel((rows, inputs, outputs), device)), default=0.0)
        except (RuntimeError, NotImplementedError, AttributeError):
            break  # this build or this processor lacks it
        if seconds:
            fastest = max(fastest, 2 * rows * inputs * outputs / seconds)
        if not 0 < seconds < _LONG_S:
            break
    return fastest


def _seconds(call: Call, device: torch.device) -> float:
    """The least seconds of one call, out of some rounds that last long enough to be timed."""

    def timed(count: int) -> float:
        begin = perf()
        for _ in range(count):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return perf() - begin

    if (took := timed(1)) > _SLOW_S:
        return took  # repeating what is slow anyway would take minutes
    count = 1
    while (took := timed(count)) < _LEAST_S:
        count *= 2
    return min(took, *(timed(count) for _ in range(_REPEATS))) / count


# Each yields calls that multiply once, with operands of its own.


def _floats(dtype: torch.dtype) -> Callable[[Product, torch.device], Iterator[Call]]:
    def calls(product: Product, device: torch.device) -> Iterator[Call]:
        rows, inputs, outputs = product
        x = torch.randn(rows, inputs, device=device).to(dtype)
        weight = torch.randn(outputs, inputs, device=device).to(dtype)
        yield lambda: functional.linear(x, weight)
        if device.type == "cpu" and can_pack(dtype):
            packed = torch.ops.mkldnn._reorder_linear_weight(weight)
            yield lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")

    return calls


def _int8(product: Product, device: torch.device) -> Iterator[Call]:
    rows, inputs, outputs = product
    x = torch.randint(-127, 127, (rows, inputs), dtype=torch.int8, device=device)
    weight = torch.randint(-127, 127, (outputs, inputs), dtype=torch.int8, device=device)
    yield lambda: torch._int_mm(x, weight.t())


def _onednn_int8(product: Product, device: torch.device) -> Iterator[Call]:
    """Unsigned activations by signed weights, packed."""
    if device.type != "cpu":
        return
    rows, inputs, outputs = product
    x = torch.randint(0, 255, (rows, inputs), dtype=torch.uint8)
    packed = torch.ops.onednn.qlinear_prepack(torch.randint(-127, 127, (outputs, inputs), dtype=torch.int8), None)
    scales, zeros = torch.full((outputs,), 0.01), torch.zeros(outputs, dtype=torch.int64)
    linear = torch.ops.onednn.qlinear_pointwise
    yield lambda: linear(x, 0.02, 128, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], "")


_KERNELS: Mapping[str, tuple[Callable[[Product, torch.device], Iterator[Call]], ...]] = {
    "fp32": (_floats(torch.float32),),
    "bf16": (_floats(torch.bfloat16),),
    "int8": (_int8, _onednn_int8),
}
