"""What may be known of a replica when a request is sent somewhere: a frozen snapshot. Decides nothing."""

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
    free_blocks: int = 0
    offered_blocks: int = 0  # of requests that were computed elsewhere and wait for its memory
