"""Which clocks a row of servers may run at, by the power it draws (POLCA, ASPLOS 2024). Pure: a share in, caps out.

draws   > 1.00  brake: everybody at once, as the breaker would
        > 0.89  low priority slowly; if that was not enough, high priority a little slower
        > 0.80  low priority at the base clock
        < 0.84  the caps of 0.89 are lifted          < 0.75  all caps are lifted
"""

from __future__ import annotations

from dataclasses import dataclass

BRAKE, TIGHT, SOFT = 1.0, 0.89, 0.80  # of the provisioned power; 0.89 + 0.118, the largest rise in 40 s, is about 1
HYSTERESIS = 0.05  # a cap is lifted so far below its threshold
COMMAND_S, BRAKE_S = 40.0, 5.0  # from a decision to its effect


@dataclass(frozen=True, slots=True)
class Caps:
    """MHz by priority of the servers (an A100: 1410 is uncapped, 1275 its base clock)."""

    low_mhz: int = 1410
    high_mhz: int = 1410


FREE = Caps()
BASE = Caps(low_mhz=1275)
LOW = Caps(low_mhz=1110)
BOTH = Caps(low_mhz=1110, high_mhz=1305)
BRAKED = Caps(288, 288)


def next_caps(share: float, caps: Caps) -> Caps:
    """The caps for a row that draws `share` of its provisioned power under `caps`."""
    if share > BRAKE:
        return BRAKED
    if share > TIGHT:
        return BOTH if caps in (LOW, BOTH) else caps if caps == BRAKED else LOW
    if share < SOFT - HYSTERESIS:
        return FREE
    if share < TIGHT - HYSTERESIS:
        return BASE if share > SOFT or caps != FREE else FREE
    return BASE if caps == FREE else caps
