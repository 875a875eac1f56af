"""The real scheduler driving the real executor, step by step in one thread, for tests that compare outcomes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from headrace.core.config import EngineSettings
from headrace.core.events import Event, Preempted, Verified
from headrace.core.keys import block_keys
from headrace.core.ports import Capacity
from headrace.core.shape import FP32, KV_FP32, KVFormat, WeightFormat
from headrace.core.step import DEVICE, HOST
from headrace.core.types import Output, Request, Sampling, TokenLogprob, Tokens
from headrace.device.checkpoint import Tensors
from headrace.device.executor import ModelExecutor
from headrace.device.hosttier import HostTier
from headrace.device.native.forward import NativeForward, kv_store
from headrace.device.native.weights import Packer, pack
from headrace.device.reference.forward import TorchForward
from headrace.device.reference.linear import Linears
from headrace.device.reference.llama import Llama, LlamaConfig
from headrace.device.reference.tensorstore import TensorStore
from headrace.engine.scheduler import Scheduler

BLOCK_TOKENS = 16
CPU = torch.device("cpu")


class Executors(Protocol):
    """A model that executors are made of."""

    def executor(self, blocks: int) -> ModelExecutor: ...


class Model:
    """Weights packed once; executors are cheap to make around them."""

    def __init__(self, config: Mapping[str, object], tensor: Callable[[str], torch.Tensor]) -> None:
        self.linears = Linears(torch.float32, CPU)
        self.llama = Llama(
            LlamaConfig.from_hf(config), tensor, self.linears.pack, torch.float32, CPU, self.linears.padded
        )

    def executor(self, blocks: int, host_blocks: int = 0) -> ModelExecutor:
        shape = self.llama.config.shape
        store = TensorStore(shape, blocks, BLOCK_TOKENS, torch.float32, CPU)
        tiers = {"layers": shape.layers, "host_blocks": host_blocks}
        capacity = Capacity(blocks, BLOCK_TOKENS, shape.max_context_tokens, shape.vocab, **tiers)
        host = HostTier(store.planes, host_blocks) if host_blocks and store.planes else None
        return ModelExecutor(TorchForward(self.llama, self.linears, store), capacity, host=host)


@dataclass(frozen=True)
class Given:
    """Tensors by name that are in memory, as a checkpoint has them in a file."""

    tensor: Callable[[str], torch.Tensor]
    file_bytes: int = 0

    def names(self) -> tuple[str, ...]:
        return ()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensor(name).shape)

    def array(self, name: str) -> np.ndarray:
        return as_array(self.tensor(name))

    def release(self) -> None:
        """Nothing is a file's."""


def as_array(tensor: torch.Tensor) -> np.ndarray:
    """As `headrace.device.arrays` has it."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


class NativeModel:
    """The same in native kernels: `weights` None keeps what the tensors are."""

    def __init__(
        self,
        config: Mapping[str, object],
        tensors: Tensors,
        weights: WeightFormat | None = FP32,
        kv: KVFormat = KV_FP32,
        variant: str | None = None,
        threads: int = 2,
    ) -> None:
        self.config = LlamaConfig.from_hf(config)
        self.kv, self.variant, self.threads = kv, variant, threads
        self.packer = Packer(tensors, weights, threads)
        self.packed = pack(self.config, self.packer)

    def forward(self, blocks: int, block_tokens: int = BLOCK_TOKENS) -> NativeForward:
        store = kv_store(self.config.shape, blocks, block_tokens, self.kv)
        return NativeForward(self.config, self.packed, self.packer, store, self.kv, self.threads, variant=self.variant)

    def executor(self, blocks: int, host_blocks: int = 0) -> ModelExecutor:
        shape, forward = self.config.shape, self.forward(blocks)
        tiers = {"layers": shape.layers, "host_blocks": host_blocks}
        capacity = Capacity(blocks, BLOCK_TOKENS, shape.max_context_tokens, shape.vocab, **tiers)
        host = HostTier(forward.store, host_blocks) if host_blocks else None
        return ModelExecutor(forward, capacity, host=host)


@dataclass(frozen=True)
class Generated:
    """One finished request, exact to the bit: the log-probabilities are floats of the model's own logits."""

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    prompt_logprobs: tuple[TokenLogprob, ...]


@dataclass
class Rig:
    """One scheduler and one executor. `now` counts steps."""

    model: Executors
    blocks: int = 4096
    budget: int = 2048
    settings: EngineSettings = field(default_factory=EngineSettings)
    host_blocks: int = 0

    def __post_init__(self) -> None:
        self.executor = self.model.executor(self.blocks, self.host_blocks)
        self.scheduler = Scheduler(self.settings, self.executor.capacity, token_budget=self.budget, observer=self)
        self.preemptions = self.cut = 0  # `cut` counts works that went through some layers only
        self.drafted = self.accepted = 0
        self.copied = {DEVICE: 0, HOST: 0}  # blocks, by where they went
        self.now = 0.0

    def observe(self, event: Event) -> None:
        self.preemptions += isinstance(event, Preempted)
        if isinstance(event, Verified):
            self.drafted += sum(event.drafted)
            self.accepted += sum(event.accepted)

    def run(
        self, requests: Iterable[Request], each_step: Callable[[int], None] = lambda _: None
    ) -> dict[str, Generated]:
        """Generate everything; `each_step` may add or abort. Nothing may be left behind."""
        outputs: dict[str, list[Output]] = {}
        for request in requests:
            self.scheduler.add(request, self.now)
        while (plan := self.scheduler.plan(self.now)) is not None:
            self.cut += sum(work.layers is not None for work in plan.work)
            for copy in plan.copies:
                self.copied[copy.target_tier] += len(copy.pairs)
            result = self.executor.step(plan)
            self.now += 1.0
            for output in self.scheduler.commit(result, self.now):
                outputs.setdefault(output.request_id, []).append(output)
            self.scheduler.check()
            each_step(int(self.now))
        assert self.scheduler.used_blocks == 0
        assert not self.executor._sequences
        return {request_id: _join(parts) for request_id, parts in outputs.items()}


def _join(parts: list[Output]) -> Generated:
    return Generated(
        tuple(token for part in parts for token in part.token_ids),
        tuple(entry for part in parts for entry in part.logprobs),
        tuple(entry for part in parts for entry in part.prompt_logprobs),
    )


def request(name: str, ids: Iterable[int], new_tokens: int, sampling: Sampling, **fields: object) -> Request:
    prompt = tuple(ids)
    keys = block_keys(prompt, BLOCK_TOKENS, b"test")
    return Request(name, (Tokens(prompt),), 0.0, new_tokens, sampling, block_keys=keys, salt=b"test", **fields)  # type: ignore[arg-type]
