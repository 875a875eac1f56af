"""From an opened checkpoint to an executor that is measured and ready: weights, memory, KV, step times."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from headrace.core.config import DeviceSettings
from headrace.core.ports import Capacity
from headrace.core.shape import ModelShape
from headrace.core.types import HeadraceError
from headrace.device import memory as memory_room
from headrace.device.checkpoint import Checkpoint
from headrace.device.executor import ModelExecutor, one_thread
from headrace.device.forward import TorchForward
from headrace.device.kvstore import KVStore
from headrace.device.linear import Linears
from headrace.device.llama import Llama, LlamaConfig
from headrace.device.memory import Memory

MOST_STEP_TOKENS = 2048  # the activations of larger steps are not worth their memory
_MEASURED_TOKENS = (16, 256)


@dataclass(frozen=True, slots=True)
class Loaded:
    executor: ModelExecutor
    memory: Memory
    dtype: torch.dtype
    device: torch.device
    steps: tuple[tuple[int, float], ...]  # measured (tokens, seconds) of prefill steps
    read_bytes: int  # of weights that every step reads: all but the embeddings that are looked up


def load(
    checkpoint: Checkpoint,
    settings: DeviceSettings,
    block_tokens: int,
    max_running: int,
    phase: Callable[[str], None] = lambda _: None,
    step_tokens: int = MOST_STEP_TOKENS,
) -> Loaded:
    """Load a model and size its KV memory beside steps of `step_tokens`; `phase` is told what begins. Raises
    DoesNotFit, BadModelFile."""
    thread = one_thread()
    sizes = (block_tokens, max_running, step_tokens)
    try:
        return thread.submit(_load, checkpoint, settings, *sizes, phase, thread).result()
    except BaseException:
        thread.shutdown(wait=False, cancel_futures=True)
        raise


def _load(
    checkpoint: Checkpoint,
    settings: DeviceSettings,
    block_tokens: int,
    max_running: int,
    step_tokens: int,
    phase: Callable[[str], None],
    thread: ThreadPoolExecutor,
) -> Loaded:
    """`load`, on the thread that will compute."""
    device, dtype = place(settings)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    config = LlamaConfig.from_hf(checkpoint.config)
    phase(f"load the weights as {name(dtype)} on {device.type}")
    linears = Linears(dtype, device)
    with torch.inference_mode():
        model = Llama(config, checkpoint.tensor, linears.pack, dtype, device, linears.padded)
    context = _context(config.shape, settings)
    memory = memory_room.size(
        config.shape,
        weights=linears.nbytes + model.nbytes,
        activations=activation_bytes(config.shape, step_tokens, max_running),
        block_tokens=block_tokens,
        max_context_tokens=context,
        wanted=settings.kv_memory,
        dtype=dtype,
        device=device,
        max_running=max_running,
    )
    capacity = Capacity(memory.blocks, block_tokens, context, config.shape.vocab, layers=config.shape.layers)
    store = KVStore(config.shape, memory.blocks, block_tokens, dtype, device)
    executor = ModelExecutor(TorchForward(model, linears, store), capacity, thread)
    phase("measure step times")
    return Loaded(executor, memory, dtype, device, tuple(executor.measure(_MEASURED_TOKENS)), linears.nbytes)


def activation_bytes(shape: ModelShape, step_tokens: int, sampled_rows: int) -> int:
    """Upper estimate of a step's temporaries in float32: the widest layer's inputs and outputs per row, the states that
    wait between two groups of layers, and four copies of the logits (raw, tempered, cumulative in double)."""
    per_row = 5 * shape.hidden + 2 * shape.head_dim * (shape.heads + 2 * shape.kv_heads) + 3 * shape.ffn
    return 4 * (step_tokens * per_row + 4 * sampled_rows * shape.vocab)


def name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


def place(settings: DeviceSettings) -> tuple[torch.device, torch.dtype]:
    """Device and dtype; `auto` prefers CUDA, and bf16 where the device multiplies it natively."""
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise HeadraceError("--device cuda was asked for, but torch sees no CUDA device; use --device cpu")
    cuda = settings.device != "cpu" and torch.cuda.is_available()
    native = cuda or torch.cpu._is_avx512_bf16_supported()
    chosen = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(settings.dtype)
    return torch.device("cuda" if cuda else "cpu"), chosen or (torch.bfloat16 if native else torch.float32)


def _context(shape: ModelShape, settings: DeviceSettings) -> int:
    """Most tokens of one request."""
    if settings.max_context is None:
        return shape.max_context_tokens
    if not 1 < settings.max_context <= shape.max_context_tokens:
        raise HeadraceError(
            f"--max-context must lie between 2 and the model's {shape.max_context_tokens}, not {settings.max_context}"
        )
    return settings.max_context
