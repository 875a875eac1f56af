"""The checks by the names of their goals. One more is one more function in a file of its own, and one line here."""

from __future__ import annotations

import soak

from reliability import (
    batches,
    control_plane,
    damage,
    drain,
    ends,
    gaps,
    hangups,
    models,
    overload,
    silence,
    startup,
    worker,
)
from reliability.check import Check

CHECKS: dict[str, Check] = {
    "R1": ends.answered,
    "R2": worker.killed,
    "R4": worker.hung,
    "R5": drain.drained,
    "R6": hangups.left,
    "R7": soak.soaked,
    "R8": overload.overloaded,
    "R11": gaps.unbroken,
    "R12": control_plane.answers,
    "R15": models.swapped,
    "R16": damage.found,
    "R17": batches.kept,
    "R18": startup.starts,
    "R19": silence.silent,
}
