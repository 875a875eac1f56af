"""What is known of a model once it is open, and once it is in memory: plain values, which cross from the process that
computes to the one that serves. `Memory` is also the table that a person can check with a pocket calculator."""

from __future__ import annotations

from dataclasses import dataclass

from headrace.core.config import format_bytes
from headrace.core.ports import Capacity, Encoding

MOST_STEP_TOKENS = 2048  # the activations of larger steps are not worth their memory


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a model's files say, without their weights."""

    name: str
    family: str
    parameters: int
    file_bytes: int
    format: str  # "gguf" or "safetensors"
    tokenizer_json: str
    chat_template: str | None
    bos_token: str | None
    eos_token: str | None
    eos_token_ids: frozenset[int]
    add_bos: bool
    files: tuple[tuple[str, int, int], ...] = ()  # (path, bytes, when changed in ns): the same model has the same


@dataclass(frozen=True, slots=True)
class Expected:
    """What a model will take, by its files and the settings; bytes."""

    weights: int
    activations: int
    kv_least: int  # for one request of full length
    kv_wanted: int  # more would never be used
    capacity: Capacity  # with the least KV
    dtype: str  # of the weights
    device: str  # "cpu" or "cuda"
    free: int  # on it, before anything is loaded
    process: int = 0  # of a process that computes nothing yet; 0: it has none of its own
    shared: int = 0  # what is there once for all such processes


@dataclass(frozen=True, slots=True)
class Memory:
    """One replica's memory in bytes. `weights` is measured, `activations` a bound computed from the step's size."""

    weights: int
    activations: int
    kv: int
    free: int  # on the device after loading, before KV
    block_bytes: int
    block_tokens: int
    max_context_tokens: int

    @property
    def blocks(self) -> int:
        return self.kv // self.block_bytes

    @property
    def tokens(self) -> int:
        return self.blocks * self.block_tokens

    def table(self) -> str:
        """The memory as text: one line per use, then what it means in tokens and requests."""
        per_token = self.block_bytes / self.block_tokens
        lengths = [length for length in (512, 2048, 8192, 32768) if length < self.max_context_tokens]
        requests = [
            f"  {self.tokens // length:>8,} concurrent requests of {length:,} tokens"
            for length in (*lengths, self.max_context_tokens)
        ]
        return "\n".join(
            [
                f"  {'weights':12} {format_bytes(self.weights):>10}",
                f"  {'activations':12} {format_bytes(self.activations):>10}  (at most, in one step)",
                f"  {'KV':12} {format_bytes(self.kv):>10}  {self.tokens:,} tokens at {format_bytes(per_token)} each,"
                f" {self.blocks:,} blocks of {self.block_tokens}",
                f"  {'free before':12} {format_bytes(self.free):>10}",
                *requests,
            ]
        )


@dataclass(frozen=True, slots=True)
class EncoderFacts:
    """An embedding model in memory."""

    encoding: Encoding
    tokenizer_json: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class LoadFacts:
    """What was loaded, and how."""

    capacity: Capacity
    memory: Memory
    dtype: str  # of the weights
    device: str  # "cpu" or "cuda"
    steps: tuple[tuple[int, float], ...]  # measured (tokens, seconds) of prefill steps; empty: not measured again
    read_bytes: int  # of weights that every step reads: all but the embeddings that are looked up
    kv: str  # how keys and values are stored
    kernels: str  # "torch", or the variant of the native kernels
    encoder: EncoderFacts | None = None  # the embedding model beside it
    process: int = 0  # bytes of the process that computes, beside weights and KV; 0: it has none of its own
