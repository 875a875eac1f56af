"""The checks by the names of their goals. One more is one more function in a file of its own, and one line here."""

from __future__ import annotations

import soak

from reliability import control_plane, drain, models, startup, worker
from reliability.check import Check

CHECKS: dict[str, Check] = {
    "R2": worker.killed,
    "R4": worker.hung,
    "R5": drain.drained,
    "R7": soak.soaked,
    "R12": control_plane.answers,
    "R15": models.swapped,
    "R18": startup.starts,
}
