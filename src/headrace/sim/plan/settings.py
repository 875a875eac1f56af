"""What the planner is asked, as flags, environment variables and TOML keys. Values only."""

from __future__ import annotations

from dataclasses import dataclass

from headrace.core.config import BadSetting, setting
from headrace.sim.settings import FORMATS


def bounded(settings: object, bounds: dict[str, tuple[float, float]]) -> None:
    """Raises BadSetting for a number outside its bounds; NaN is outside of all."""
    for name, (low, high) in bounds.items():
        value = getattr(settings, name)
        if value is not None and not low <= value <= high:
            raise BadSetting(f"--{name.replace('_', '-')} is {value}; it must be between {low:g} and {high:g}")


@dataclass(frozen=True, slots=True)
class FitSettings:
    """Where the model would lie, and what its requests are like."""

    device: str = setting("H100-SXM", "devices of one replica: NAME, 4xNAME, or 2x8xNAME@LINK")
    weights: str = setting("bf16", "format of the weights", FORMATS)
    kv: str = setting("bf16", "format of keys and values", FORMATS)
    tensor: int | None = setting(None, "devices that share every layer; by default all of a stage")
    pipeline: int = setting(1, "stages, each with its share of the layers")
    memory_use: float = setting(0.9, "share of a device's memory for weights and KV")
    prompt_tokens: int = setting(1024, "of a typical request")
    output_tokens: int = setting(256, "of its answer")
    batches: str = setting("1,8,32,128", "requests side by side for which speeds are told; the most that fit are added")
    host_ms: float = setting(0.5, "what the host adds to every step")

    def __post_init__(self) -> None:
        most = 10_000_000
        bounded(
            self,
            {
                "tensor": (1, 1024),
                "pipeline": (1, 1024),
                "memory_use": (0.01, 1.0),
                "prompt_tokens": (1, most),
                "output_tokens": (1, most),
                "host_ms": (0.0, 10_000.0),
            },
        )
        if not self.sizes:
            raise BadSetting("--batches names no number; write 1,8,32")

    @property
    def sizes(self) -> tuple[int, ...]:
        """The batches in ascending order. Raises BadSetting."""
        try:
            sizes = sorted({int(word) for word in self.batches.split(",") if word.strip()})
        except ValueError as error:
            raise BadSetting(f"--batches {self.batches!r} is not a list of numbers such as 1,8,32") from error
        if sizes and not 1 <= sizes[0] <= sizes[-1] <= 100_000:
            raise BadSetting("--batches must be numbers from 1 to 100000")
        return tuple(sizes[:32])
