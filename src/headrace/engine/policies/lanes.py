"""How two lanes divide a device: the share of the prompts and that of the decodes, as fractions of its compute units.
Shares are set whenever a step begins, and hold for it to its end, so each lane changes at its own next step. Owns what
a policy measured so far; decides nothing about who is in a step.

    fixed      what the settings say
    semi-pd    feedback: what first tokens and decodes took lately, against what was promised
    nexus      prediction: what the two steps at hand would take under other shares
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from headrace.core.config import EngineSettings
from headrace.core.events import Arrived, Decoded, Drew, Event, Finished, StepDone
from headrace.core.types import HeadraceError, RequestId

LEAST = 0.1  # of the device, for either lane
STEP = 0.05  # by which shares move

Shares = tuple[float, float]  # of the prompts' lane and of the decodes'


class Load(NamedTuple):
    """What one step computes, as sums over its rows. A row of one token is a decode."""

    rows: int
    tokens: int
    sampled: int
    decodes: int
    pairs: int  # of queries and keys, over the other rows
    prefill_context: int  # keys read, over the other rows
    decode_context: int


class LanesView(NamedTuple):
    """Both lanes at the moment a step begins in one of them."""

    now: float
    lane: int  # 0: the prompts', 1: the decodes'
    loads: tuple[Load | None, ...]  # of the steps in flight, this one among them; None: the lane rests
    shares: Shares  # as they were last told
    used_blocks: int
    total_blocks: int


SharePolicy = Callable[[LanesView], Shares]  # one that remembers may have `observe`, see `joints`

# (loads, shares) -> seconds of either step beside the other; 0.0 for a lane that rests
Predict = Callable[[tuple[Load | None, ...], Shares], Shares]


@dataclass(frozen=True, slots=True)
class Measured:
    """A prediction from two numbers, for a device of which nothing else is known: base_s + token_s per token with the
    whole device, in proportion more with less. What both were promised, they share."""

    base_s: float
    token_s: float

    def __call__(self, loads: tuple[Load | None, ...], shares: Shares) -> Shares:
        twice = max(1.0, sum(share for load, share in zip(loads, shares, strict=True) if load))
        prompts, decodes = (
            (self.base_s + self.token_s * load.tokens) * twice / share if load else 0.0
            for load, share in zip(loads, shares, strict=True)
        )
        return prompts, decodes


def given(settings: EngineSettings) -> Shares:
    """What `lane_shares` says. Raises HeadraceError."""
    try:
        prompts, decodes = (float(part) / 100 for part in settings.lane_shares.split(","))
    except ValueError as error:
        raise HeadraceError(f"--lane-shares {settings.lane_shares!r} is not two percentages, such as 60,40") from error
    if not all(LEAST <= share <= 1.0 for share in (prompts, decodes)):
        raise HeadraceError(f"--lane-shares {settings.lane_shares!r}: both lie between {LEAST:.0%} and 100 %")
    return prompts, decodes


class Fixed:
    """What the settings say. Without contention if the shares add up to 100 %."""

    def __init__(self, settings: EngineSettings) -> None:
        self._shares = given(settings)

    def __call__(self, view: LanesView) -> Shares:
        return self._shares


class SemiPD:
    """semi-PD's feedback (arXiv:2504.19867): after every WINDOW steps, with x and y what the lanes get when both are
    busy, x / (x + y) of the device if they were promised more than there is,

        TTFT(x) = a / (x - r l) + b     r arrivals a second, l seconds a prompt takes on the whole device: M/M/1
        TPOT(y) = a' / y + b'

    are fitted to what was observed. If only first tokens break their promise, x grows by up to MOST steps until the fit
    says that they keep it, or y shrinks where x is all; likewise for decodes. If both or none break it, nothing moves.
    New shares hold SWITCH_S later: their workers are made in the background.

    Chosen here, as it was not published or has no meaning here: a = l, so that one window fits b; b' = 0 until two
    windows with other shares are known; TTFT at its 90th percentile, relative to what its request was promised, TPOT as
    the mean over a window, which is what each of its requests gets; WINDOW, MOST and SWITCH_S.
    """

    WINDOW = 200
    MOST = 4
    SWITCH_S = 0.5
    REMEMBERED = 8  # windows

    def __init__(self, settings: EngineSettings) -> None:
        self._shares = given(settings)
        self._next: tuple[float, Shares] | None = None  # (when, which)
        self._ttft_s, self._tpot_s = settings.first_token_ms / 1000, settings.inter_token_ms / 1000
        self._due: dict[RequestId, tuple[float, float]] = {}  # (arrival, promise) of those without a token
        self._seen: deque[tuple[float, float]] = deque(maxlen=self.REMEMBERED)  # (1 / y, TPOT over its promise)
        self._begun_s: float | None = None
        self._reset()

    def _reset(self) -> None:
        self._steps = self._arrived = self._drawn = 0
        self._prompt_s = self._gap_s = 0.0
        self._late: list[float] = []  # first tokens, relative to what was promised

    def observe(self, event: Event) -> None:
        match event:
            case StepDone():
                self._steps += event.run.steps
                self._prompt_s += event.seconds
            case Decoded():
                self._prompt_s -= event.run.total_s
                self._gap_s += event.requests * event.run.total_s
                self._drawn += event.requests * event.run.steps
            case Arrived():
                slo = event.request.slo if event.request else None
                self._arrived += 1
                self._due[event.request_id] = (event.at_s, (slo and slo.ttft_s) or self._ttft_s)
                self._tpot_s = (slo and slo.tpot_s) or self._tpot_s
            case Drew():
                for request_id in event.first:
                    if request_id in self._due:
                        arrival_s, promise_s = self._due.pop(request_id)
                        self._late.append((event.at_s - arrival_s) / promise_s)
            case Finished():
                self._due.pop(event.request_id, None)

    def __call__(self, view: LanesView) -> Shares:
        if self._next is not None and view.now >= self._next[0]:
            self._shares, self._next = self._next[1], None
            self._begun_s = None
        if self._begun_s is None:
            self._begun_s = view.now
            self._reset()
        if self._steps >= self.WINDOW and self._next is None:
            self._judge(view.now)
        return self._shares

    def _judge(self, now: float) -> None:
        """The window is full."""
        late, slow = self._observed(now)
        moved = self._shares
        if late > 1.0 >= slow:
            moved = self._more(0, self._first_token(late, now))
        elif slow > 1.0 >= late:
            moved = self._more(1, self._decode(slow))
        self._begun_s = now
        self._reset()
        if moved != self._shares:
            self._next = (now + self.SWITCH_S, moved)

    def _observed(self, now: float) -> tuple[float, float]:
        """(TTFT, TPOT) over what was promised. Who still waits has waited so long at least."""
        waiting = [(now - arrival_s) / promise_s for arrival_s, promise_s in self._due.values()]
        late = sorted([*self._late, *(ratio for ratio in waiting if ratio > 1.0)])
        slow = self._gap_s / self._drawn / self._tpot_s if self._drawn else 0.0
        if self._drawn:
            self._seen.append((1 / _attained(self._shares)[1], slow))
        return late[min(len(late) - 1, int(0.9 * len(late)))] if late else 0.0, slow

    def _first_token(self, late: float, now: float) -> Callable[[Shares], float]:
        """The fitted TTFT over its promise. With more prompts than the share can compute there is no end of it."""
        x, prompts = _attained(self._shares)[0], max(len(self._late), 1)
        whole_s = self._prompt_s / prompts * x
        load = self._arrived / max(now - (self._begun_s or 0.0), 1e-9) * whole_s
        a = whole_s / self._ttft_s
        b = late - a / (x - load) if x > load else 0.0

        def predicted(shares: Shares) -> float:
            room = _attained(shares)[0] - load
            return a / room + b if room > 0 else math.inf

        return predicted

    def _decode(self, slow: float) -> Callable[[Shares], float]:
        """The fitted TPOT over its promise: least squares, through the origin unless that has a sense."""
        mean_u, mean_v = (sum(column) / len(self._seen) for column in zip(*self._seen, strict=True))
        spread = sum((u - mean_u) ** 2 for u, _ in self._seen)
        slope = sum((u - mean_u) * (v - mean_v) for u, v in self._seen) / spread if spread > 1e-6 else 0.0
        u, v = self._seen[-1]
        a = slope if 0.0 < slope < v / u else v / u
        return lambda shares: v + a * (1 / _attained(shares)[1] - u)

    def _more(self, lane: int, predicted: Callable[[Shares], float]) -> Shares:
        """So many steps for one lane as the prediction wants, at most MOST."""
        shares = self._shares
        for _ in range(self.MOST):
            if predicted(shares) <= 1.0:
                break
            shares = _moved(shares, lane)
        return shares


def _attained(shares: Shares) -> Shares:
    """When both are busy."""
    total = max(1.0, sum(shares))
    return shares[0] / total, shares[1] / total


def _moved(shares: Shares, lane: int) -> Shares:
    """One step more for one lane; where it has all, one less for the other."""
    mine, other = shares[lane], shares[1 - lane]
    if mine < 1.0:
        mine = round(min(1.0, mine + STEP), 6)
    else:
        other = round(max(LEAST, other - STEP), 6)
    return (mine, other) if lane == 0 else (other, mine)


class Nexus:
    """Nexus's prediction (arXiv:2507.06608): the device is split anew at every step. As long as less than FULL of the
    KV memory is in use, prompts first: the split that ends the prompts' step soonest while the decodes' takes at most
    BETA times what it would take alone; beyond, decodes first: the split that ends theirs soonest while the prompts'
    takes at most ALPHA times. The search goes on from the split there is, step by step, as long as it gets better, and
    a split that differs by no more than DELTA is not worth a change. A lane without the other gets the whole device.

    Its queue is the ordering `shortest-prompt`. The values of FULL, ALPHA, BETA, DELTA and the form of the prediction
    are chosen here: they were not published where we could read.
    """

    FULL = 0.7
    ALPHA = 2.0
    BETA = 1.5
    DELTA = 0.05

    def __init__(self, settings: EngineSettings, predict: Predict) -> None:
        prompts, decodes = given(settings)
        self._split = prompts / (prompts + decodes)  # the prompts' part
        self._predict = predict

    def __call__(self, view: LanesView) -> Shares:
        prompts, decodes = view.loads
        if prompts is None or decodes is None:
            return (1.0 if prompts else LEAST), (1.0 if decodes else LEAST)
        first = 0 if view.used_blocks < self.FULL * view.total_blocks else 1
        found = self._search(view.loads, first)
        if abs(found - self._split) > self.DELTA:
            self._split = found
        return self._split, 1.0 - self._split

    def _search(self, loads: tuple[Load | None, ...], first: int) -> float:
        """The prompts' part. `first` is the lane that is to be quick, the other one has a bound."""
        other = 1 - first
        rest = tuple(load if lane == other else None for lane, load in enumerate(loads))
        alone = self._predict(rest, (1.0, 1.0))[other]
        bound = alone * (self.BETA if first == 0 else self.ALPHA)
        towards = STEP if first == 0 else -STEP  # more for the first

        def seconds(split: float) -> Shares:
            return self._predict(loads, (split, 1.0 - split))

        split, now = self._split, seconds(self._split)
        if now[other] > bound:
            while now[other] > bound and _inside(split - towards):
                split = round(split - towards, 6)
                now = seconds(split)
            return split
        while _inside(split + towards):
            then = seconds(split + towards)
            if then[other] > bound or then[first] >= now[first]:
                break
            split, now = round(split + towards, 6), then
        return split


def _inside(split: float) -> bool:
    return LEAST <= round(split, 6) <= 1.0 - LEAST


Make = Callable[[EngineSettings, Predict | None], SharePolicy | None]


def _nexus(settings: EngineSettings, predict: Predict | None) -> SharePolicy:
    if predict is None:
        raise HeadraceError("--lanes nexus needs to know what steps take; measure or model the device, or take semi-pd")
    return Nexus(settings, predict)


LANES: Mapping[str, Make] = {
    "one": lambda settings, predict: None,
    "fixed": lambda settings, predict: Fixed(settings),
    "semi-pd": lambda settings, predict: SemiPD(settings),
    "nexus": _nexus,
}
