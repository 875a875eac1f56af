"""From an opened checkpoint to an executor that is measured and ready: weights, memory, KV, step times."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from math import prod

from headrace.core.config import DeviceSettings
from headrace.core.facts import MOST_STEP_TOKENS, EncoderFacts, Expected, LoadFacts, Memory
from headrace.core.ports import Capacity, least_copied_blocks
from headrace.core.shape import KVFormat, ModelShape
from headrace.core.types import HeadraceError
from headrace.device import cuda, hosttier, kvstore
from headrace.device import memory as memory_room
from headrace.device.architecture import LlamaConfig
from headrace.device.checkpoint import Checkpoint
from headrace.device.executor import ModelExecutor, one_thread
from headrace.device.forward import Forward
from headrace.device.hosttier import Tier
from headrace.device.kvstore import Kept
from headrace.device.native import forward as native
from headrace.device.native.library import variant
from headrace.device.native.weights import FORMATS, Packer, pack

_MEASURED_TOKENS = (16, 128)
_MEASURED_BLOCKS = 16


@dataclass(frozen=True, slots=True)
class Loaded:
    executor: ModelExecutor
    memory: Memory
    dtype: str  # of the weights
    device: str  # "cpu" or "cuda"
    steps: tuple[tuple[int, float], ...]  # measured (tokens, seconds) of prefill steps
    read_bytes: int  # of weights that every step reads: all but the embeddings that are looked up
    kv: str  # how keys and values are stored
    kernels: str  # "torch", or the variant of the native kernels

    def facts(self, encoder: EncoderFacts | None = None) -> LoadFacts:
        """The same for whoever has no business with tensors."""
        capacity = self.executor.capacity
        return LoadFacts(
            capacity, self.memory, self.dtype, self.device, self.steps, self.read_bytes, self.kv, self.kernels, encoder
        )


Behind = Callable[[int], Tier]  # a host tier of so many blocks behind a store


@dataclass(frozen=True, slots=True)
class Built:
    """Weights in memory, and what is needed to put KV beside them."""

    weights: int  # bytes
    read: int  # bytes of them that every step reads
    dtype: str
    kv: str
    kernels: str
    kv_shape: ModelShape  # of the stored planes
    kv_itemsize: int  # bytes of a stored number
    open: Callable[[int, Kept | None], tuple[Forward, Behind]]  # with so many blocks, in this memory


def load(
    checkpoint: Checkpoint,
    settings: DeviceSettings,
    block_tokens: int,
    max_running: int,
    phase: Callable[[str], None] = lambda _: None,
    step_tokens: int = MOST_STEP_TOKENS,
    host_bytes: int = 0,
) -> Loaded:
    """Load a model and size its KV memory beside steps of `step_tokens`, with a host tier of `host_bytes` behind it;
    `phase` is told what begins. Raises DoesNotFit, BadModelFile."""
    thread = one_thread()
    sizes = (block_tokens, max_running, step_tokens, host_bytes)
    try:
        return thread.submit(load_here, checkpoint, settings, *sizes, phase, thread).result()
    except BaseException:
        thread.shutdown(wait=False, cancel_futures=True)
        raise


def load_here(
    checkpoint: Checkpoint,
    settings: DeviceSettings,
    block_tokens: int,
    max_running: int,
    step_tokens: int,
    host_bytes: int,
    phase: Callable[[str], None],
    thread: ThreadPoolExecutor | None = None,
    kv: Kept | None = None,
    measured: bool = True,
    shared: bool = False,
    packed: Callable[[int], None] = lambda _: None,
) -> Loaded:
    """`load`, on the thread that will compute, which is the caller's; or, where that one is `shared` with other models
    and computes steps of them meanwhile, on any other. On a CPU, KV lies in the memory `kv` if there is one. Not
    `measured`: step times are not asked for, nor is what is worth a copy. `packed` hears how many bytes of weights are
    in memory."""
    device = device_of(settings)
    config = LlamaConfig.from_hf(checkpoint.config)
    why_not = _why_not_native(config, settings, device, block_tokens)
    if why_not is None:
        built = _native(checkpoint, config, settings, block_tokens, phase, packed)
    else:
        from headrace.device.reference.forward import build

        built = build(checkpoint, config, settings, device, block_tokens, phase, why_not)
    context = _context(config.shape, settings)
    memory = memory_room.size(
        built.kv_shape,
        weights=built.weights,
        activations=activation_bytes(config.shape, step_tokens, max_running),
        block_tokens=block_tokens,
        max_context_tokens=context,
        wanted=settings.kv_memory,
        itemsize=built.kv_itemsize,
        device=device,
        max_running=max_running,
    )
    capacity = Capacity(memory.blocks, block_tokens, context, config.shape.vocab, layers=config.shape.layers)
    forward, behind = built.open(memory.blocks, kv)
    executor = ModelExecutor(forward, capacity, thread, shared=shared)
    steps: tuple[tuple[int, float], ...] = ()
    if measured:
        phase("measure step times")
        measure = partial(executor.measure, _MEASURED_TOKENS)
        steps = tuple(thread.submit(measure).result() if shared and thread else measure())
    if host_bytes:
        host = behind(memory_room.host_blocks(host_bytes, memory.block_bytes))
        capacity = _with_host(capacity, host, steps) if steps else replace(capacity, host_blocks=host.blocks)
        executor = ModelExecutor(forward, capacity, thread, host, shared)
    return Loaded(executor, memory, built.dtype, device, steps, built.read, built.kv, built.kernels)


def _why_not_native(config: LlamaConfig, settings: DeviceSettings, device: str, block_tokens: int) -> str | None:
    """None where native kernels will compute; else why they will not. Raises HeadraceError if they must."""
    if settings.kernels == "torch":
        why = "--kernels torch"
    elif device != "cpu":
        why = f"they compute on a CPU, not on {device}"
    else:
        why = native.why_not(config, block_tokens) or ""
    needs = [settings.kernels == "native", settings.dtype in ("q8", "q4"), settings.kv_dtype not in ("auto", "fp32")]
    if why and any(needs):
        asked = ("--kernels native", f"--dtype {settings.dtype}", f"--kv-dtype {settings.kv_dtype}")[needs.index(True)]
        raise HeadraceError(f"{asked} needs the native kernels, and there are none here: {why}")
    return why or None


def _native(
    checkpoint: Checkpoint,
    config: LlamaConfig,
    settings: DeviceSettings,
    block_tokens: int,
    phase: Callable[[str], None],
    told: Callable[[int], None],
) -> Built:
    phase("pack the weights for native kernels")
    threads = settings.threads or native.default_threads()
    packer = _packer(checkpoint, settings)
    packer.packed = told
    packed = pack(config, packer)
    kind = _kv_kind(settings)

    def open_with(blocks: int, kept: Kept | None) -> tuple[Forward, Behind]:
        store = native.kv_store(config.shape, blocks, block_tokens, kind, kept)
        return native.NativeForward(config, packed, packer, store, kind, threads), partial(hosttier.HostTier, store)

    looked_up = 0 if config.shape.tied_embedding else packer.embedding_bytes
    return Built(
        packer.nbytes, packer.nbytes - looked_up, packer.formats, kind.name, f"native {variant()}",
        native.stored_shape(config.shape, kind), native.kv_dtype(kind).itemsize, open_with,
    )  # fmt: skip


def _packer(checkpoint: Checkpoint, settings: DeviceSettings) -> Packer:
    wanted = next((each for each in FORMATS if each.name == settings.dtype), None)
    return Packer(checkpoint.tensors, wanted, settings.threads or native.default_threads())


def _kv_kind(settings: DeviceSettings) -> KVFormat:
    kv = settings.kv_dtype if settings.kv_dtype != "auto" else "fp32" if settings.dtype == "fp32" else "bf16"
    return next(each for each in native.KV_KINDS if each.name == kv)


def expect(
    checkpoint: Checkpoint, settings: DeviceSettings, block_tokens: int, max_running: int, step_tokens: int
) -> Expected:
    """Nothing is loaded. A longest context that is more than the model has is cut. Raises BadModelFile, and
    HeadraceError for settings that cannot be."""
    device = device_of(settings)
    config = LlamaConfig.from_hf(checkpoint.config)
    context = min(config.shape.max_context_tokens, settings.max_context or config.shape.max_context_tokens)
    if _why_not_native(config, settings, device, block_tokens) is None:
        packer, kind = _packer(checkpoint, settings), _kv_kind(settings)
        weights, kept = packer.expected_bytes(), packer.formats
        block = kvstore.block_bytes(
            native.stored_shape(config.shape, kind), block_tokens, native.kv_dtype(kind).itemsize
        )
    else:
        from headrace.device.reference.forward import dtype_of, name

        dtype = dtype_of(settings, device)
        weights = dtype.itemsize * sum(prod(checkpoint.tensors.shape(stored)) for stored in checkpoint.names())
        block, kept = kvstore.block_bytes(config.shape, block_tokens, dtype.itemsize), name(dtype)
    least = -(-context // block_tokens) * block
    most = max_running * least if settings.kv_memory is None else min(max_running * least, settings.kv_memory)
    return Expected(
        weights,
        activation_bytes(config.shape, step_tokens, max_running),
        least,
        max(least, most),
        Capacity(least // block, block_tokens, context, config.shape.vocab, layers=config.shape.layers),
        kept,
        device,
        memory_room.free_bytes(device),
    )


def _with_host(capacity: Capacity, host: Tier, steps: tuple[tuple[int, float], ...]) -> Capacity:
    """The capacity with a tier, and with how many blocks are worth a copy as this machine copies and computes."""
    (few, few_s), (many, many_s) = steps[0], steps[-1]
    block_s = capacity.block_tokens * (many_s - few_s) / max(many - few, 1)
    count = min(_MEASURED_BLOCKS, host.blocks, capacity.blocks)
    one_s, all_s = hosttier.seconds(host, 1), hosttier.seconds(host, count)
    each_s = max(0.0, all_s - one_s) / max(count - 1, 1)
    least = least_copied_blocks(max(0.0, one_s - each_s), each_s, block_s)
    return replace(capacity, host_blocks=host.blocks, least_copied_blocks=least)


def activation_bytes(shape: ModelShape, step_tokens: int, sampled_rows: int) -> int:
    """Upper estimate of a step's temporaries in float32: the widest layer's inputs and outputs per row, the states that
    wait between two groups of layers, and four copies of the logits (raw, tempered, cumulative in double)."""
    per_row = 5 * shape.hidden + 2 * shape.head_dim * (shape.heads + 2 * shape.kv_heads) + 3 * shape.ffn
    return 4 * (step_tokens * per_row + 4 * sampled_rows * shape.vocab)


def device_of(settings: DeviceSettings) -> str:
    """`auto` prefers CUDA. Raises HeadraceError."""
    if settings.device == "cuda" and not cuda.present():
        raise HeadraceError("--device cuda was asked for, but torch sees no CUDA device; use --device cpu")
    return "cuda" if settings.device != "cpu" and cuda.present() else "cpu"


def _context(shape: ModelShape, settings: DeviceSettings) -> int:
    """Most tokens of one request."""
    if settings.max_context is None:
        return shape.max_context_tokens
    if not 1 < settings.max_context <= shape.max_context_tokens:
        raise HeadraceError(
            f"--max-context must lie between 2 and the model's {shape.max_context_tokens}, not {settings.max_context}"
        )
    return settings.max_context
