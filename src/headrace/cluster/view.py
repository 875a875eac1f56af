"""What may be known of a replica when something is decided among several: a frozen snapshot. Decides nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["both", "prefill", "decode"]


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """One replica at one moment. Blocks are of KV."""

    replica: int
    role: Role = "both"
    requests: int = 0  # sent to it and not finished
    prompt_tokens: int = 0  # of these
    blocks: int = 0  # in all
    free_blocks: int = 0  # neither used nor promised
    offered_blocks: int = 0  # promised to requests that were computed elsewhere and do not run here yet
    cached_tokens: int = 0  # of the prompt that is asked about: no work here
    ready: bool = True  # False: it is starting
    idle_s: float = 0.0  # since its last request; 0 while it has one
