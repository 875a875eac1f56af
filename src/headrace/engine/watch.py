"""When an executor is hung: it gives no sign of life, or a step takes far longer than it could. Pure; whoever has the
power to end it asks. Owns when each step began, and how much longer than predicted steps have taken of late.

    bound of a step = SLACK_S + PATIENCE * predicted * (how much longer than predicted the slowest of late took)

A step computes no more tokens than the budget, so even prompts of any length are many short steps. Attention makes
later ones longer than predicted, little by little; each of them raises the bound of the next.
"""

from __future__ import annotations

from headrace.core.step import StepPlan

SILENT_S = 3.5  # without a sign of life, which comes once a second
SLACK_S = 3.0
PATIENCE = 20.0
_FORGETS = 0.95  # of the slowest ratio, with every step
_NAP_S = 1.0  # who asks more often than this was stopped itself if it did not


class Watch:
    """`base_s` and `per_token_s` predict a step, in seconds."""

    def __init__(self, base_s: float, per_token_s: float) -> None:
        self._base_s = max(base_s, 0.0)
        self._per_token_s = max(per_token_s, 0.0)
        self._began: dict[int, tuple[float, float]] = {}  # lane -> (when, predicted seconds)
        self._slowest = 1.0  # actual over predicted
        self._heard_s: float | None = None  # the last sign of life; None: none is expected
        self._looked_s: float | None = None

    def began(self, plan: StepPlan, now: float) -> None:
        predicted_s = (self._base_s + plan.tokens * self._per_token_s) * plan.steps
        self._began[plan.lane] = now, max(predicted_s, 1e-6)

    def waits(self, plan: StepPlan) -> None:
        """It has not begun yet, for others compute: `began` will be said again."""
        self._began.pop(plan.lane, None)

    def ended(self, plan: StepPlan, now: float) -> None:
        began_s, predicted_s = self._began.pop(plan.lane, (now, 1.0))
        self._slowest = max(1.0, _FORGETS * self._slowest, (now - began_s) / predicted_s)

    def heard(self, now: float) -> None:
        """A sign of life. From the first one on, they are expected."""
        self._heard_s = now

    def forget(self) -> None:
        """The executor is another one, or none: nothing is under way."""
        self._began.clear()
        self._slowest = 1.0
        self._heard_s = self._looked_s = None

    def look(self, now: float) -> str | None:
        """Why it has to be given up, for whoever asks several times a second; None: it need not be. If it was not asked
        for longer, whoever asks was stopped, and maybe the whole machine: that time counts for nobody."""
        if self._looked_s is not None and now - self._looked_s > _NAP_S:
            self._shift(now - self._looked_s)
        self._looked_s = now
        if self._heard_s is not None and now - self._heard_s > SILENT_S:
            return f"it gave no sign of life for {now - self._heard_s:.1f} s"
        return self.overdue(now)

    def overdue(self, now: float) -> str | None:
        """Whether a step takes too long, in words."""
        for began_s, predicted_s in self._began.values():
            if now - began_s > self.bound_s(predicted_s):
                return f"a step that was to take {predicted_s:.2f} s has taken {now - began_s:.1f} s"
        return None

    def bound_s(self, predicted_s: float) -> float:
        return SLACK_S + PATIENCE * predicted_s * self._slowest

    def _shift(self, seconds: float) -> None:
        self._began = {lane: (began_s + seconds, predicted) for lane, (began_s, predicted) in self._began.items()}
        if self._heard_s is not None:
            self._heard_s += seconds
