"""Fleets sized by queueing formulas: how many devices for a wait that 99 of 100 requests stay under, alone or in two
pools by length (the arithmetic of vllm-project/semantic-router's fleet simulator).

A device is a number of slots, each a server of an M/G/c queue: a request holds one for all its steps at the pace of a
full device. Erlang's C gives who waits, Kimura's correction how long. What such formulas hide, `pools_checked` shows.

    requests --length <= threshold--> short pool: many slots a device, as every slot is short
             '-----------otherwise--> long pool:  few
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, exp, inf, log
from random import Random

from headrace.core.types import HeadraceError

MOST_LOAD = 0.85  # of the servers' time
CONTEXT = 8192  # tokens for which profiles are given
DRAWS, SEED = 3000, 42
MOST_DEVICES = 1_000_000

Pair = tuple[int, int]  # prompt tokens, answer tokens
Cdf = Sequence[tuple[int, float]]  # (tokens of prompt and answer, share of the requests that have at most so many)


class NoFleet(HeadraceError):
    """No number of devices keeps the promise."""


@dataclass(frozen=True, slots=True)
class Profile:
    """A device (or replica) as step_s + row_s (length / 8192) rows seconds a step, and as so many slots."""

    step_s: float
    row_s: float
    chunk_tokens: int
    kv_blocks: int
    most_slots: int  # at 8192 tokens each
    block_tokens: int = 16
    prompt_token_s: float = 0.0  # that every prompt token adds to the step it is computed in; published profiles: none

    def slots(self, context: int) -> int:
        """Requests side by side when each may have `context` tokens."""
        return min(self.most_slots * CONTEXT // context, self.kv_blocks // ceil(context / self.block_tokens))

    def step(self, rows: int, context: float = CONTEXT) -> float:
        return self.step_s + self.row_s * context / CONTEXT * rows

    def steps(self, pair: Pair) -> int:
        """That a request takes part in."""
        return ceil(pair[0] / self.chunk_tokens) + pair[1]

    def service_s(self, pair: Pair, slots: int, others_s: float = 0.0) -> float:
        """One request's time in its slot while all others are taken; `others_s` is what prompts add to every step."""
        return self.steps(pair) * (self.step(slots, sum(pair)) + others_s)


@dataclass(frozen=True, slots=True)
class Service:
    """What a device does with requests of some lengths."""

    slots: int
    per_s: float  # requests of one device
    cv2: float  # squared coefficient of variation of a request's time
    prefill_s: float  # mean, alone

    @classmethod
    def of(cls, profile: Profile, pairs: Sequence[Pair], context: int) -> Service:
        """Raises NoFleet when not even one slot of that context fits."""
        slots = profile.slots(context)
        if slots < 1:
            raise NoFleet(f"not even one request of {context:,} tokens fits on a device")
        prompts = sum(prompt for prompt, _ in pairs) * profile.prompt_token_s
        others_s = slots * prompts / sum(map(profile.steps, pairs))
        times = [profile.service_s(pair, slots, others_s) for pair in pairs]
        mean = sum(times) / len(times)
        square = sum(time * time for time in times) / len(times)
        chunks = sum(ceil(prompt / profile.chunk_tokens) for prompt, _ in pairs)
        prefill_s = (chunks * profile.step(1) + prompts) / len(pairs)
        return cls(slots, slots / mean, max(0.01, square / mean**2 - 1), prefill_s)

    def wait_s(self, devices: int, rate: float, tail: float = 0.01) -> float:
        """The wait that all but `tail` stay under; infinite when they do not keep up."""
        servers, each = devices * self.slots, self.per_s / self.slots
        if rate >= servers * each:
            return inf
        waiting = erlang_c(servers, rate / each)
        if waiting <= tail:
            return 0.0
        return log(waiting / tail) / (2 * (servers * each - rate) / (1 + self.cv2))

    def devices(self, rate: float, slo_s: float) -> int:
        """The fewest that keep the wait, at most 85 % busy. Raises NoFleet."""
        count = max(1, ceil(rate / self.per_s) + 1)
        while self.wait_s(count, rate) > slo_s:
            count += 1
            if count > MOST_DEVICES:
                raise NoFleet("more than a million devices would be needed")
        return max(count, ceil(rate / (MOST_LOAD * self.per_s)))


def erlang_c(servers: int, load: float) -> float:
    """Who has to wait, of Poisson arrivals at `servers` servers with `load` of them busy on average."""
    blocked = 1.0
    for number in range(1, servers + 1):
        blocked = load * blocked / (number + load * blocked)
    busy = load / servers
    return blocked / (1 - busy * (1 - blocked))


@dataclass(frozen=True, slots=True)
class Sized:
    """One pool: how many devices, and the first tokens' 99th percentile."""

    devices: int
    rate: float
    context: int  # tokens a slot is made for
    ttft_s: float
    service: Service


@dataclass(frozen=True, slots=True)
class Split:
    """Two pools; `threshold` tokens and fewer go to the short one."""

    threshold: int
    short: Sized
    long: Sized

    @property
    def devices(self) -> int:
        return self.short.devices + self.long.devices


def sized(profile: Profile, pairs: Sequence[Pair], rate: float, slo_s: float, context: int) -> Sized:
    """One pool for these lengths. Raises NoFleet."""
    service = Service.of(profile, pairs, context)
    count = service.devices(rate, slo_s)
    return Sized(count, rate, context, service.wait_s(count, rate) + service.prefill_s, service)


def split(
    profile: Profile, pairs: Sequence[Pair], rate: float, slo_s: float, threshold: int, context: int
) -> Split | None:
    """Two pools for the same traffic; None when one of them would be empty."""
    short = [pair for pair in pairs if sum(pair) <= threshold]
    long = [pair for pair in pairs if sum(pair) > threshold]
    if not short or not long:
        return None
    share = len(short) / len(pairs)
    return Split(
        threshold,
        sized(profile, short, share * rate, slo_s, threshold),
        sized(profile, long, (1 - share) * rate, slo_s, context),
    )


# -- lengths as a distribution function --------------------------------------------------------------------------------


def drawn(cdf: Cdf, low: int = 1, high: int = 1 << 30) -> list[Pair]:
    """Requests of these total lengths, four fifths prompt; the same every time."""
    rng, found = Random(SEED), []
    for _ in range(DRAWS):
        u, before = rng.random(), 0
        for tokens, share in cdf:
            if u <= share:
                break
            before = tokens
        top = max(1, min(tokens, high))
        length = rng.randint(min(max(low, before + 1), top), top)
        prompt = max(1, int(0.8 * length))
        found.append((prompt, max(1, length - prompt)))
    return found


def split_cdf(profile: Profile, cdf: Cdf, rate: float, slo_s: float, threshold: int, context: int) -> Split:
    """As `split`, from a distribution function cut at one of its points. Raises NoFleet."""
    share = max(part for tokens, part in cdf if tokens <= threshold)
    short = [(tokens, part / share) for tokens, part in cdf if tokens <= threshold]
    long = [(tokens, (part - share) / (1 - share)) for tokens, part in cdf if tokens > threshold]
    return Split(
        threshold,
        sized(profile, drawn(short, high=threshold), share * rate, slo_s, threshold),
        sized(profile, drawn(long, low=threshold, high=context), (1 - share) * rate, slo_s, context),
    )


# -- money and power ---------------------------------------------------------------------------------------------------


def kusd_per_year(devices: int, usd_per_hour: float) -> float:
    return devices * usd_per_hour * 8.76


def provisioned(devices: int, failures_per_day: float, repair_days: float) -> int:
    """So many that `devices` of them work on average: availability is 1 / (1 + failures x repair)."""
    return ceil(devices * (1 + failures_per_day * repair_days) - 1e-9)


def watts(idle_w: float, full_w: float, steepness: float, middle: float, batch: float) -> float:
    """Logistic in the logarithm of the batch."""
    if batch < 1:
        return idle_w
    return (full_w - idle_w) / (1 + exp(-steepness * (log(batch, 2) - middle))) + idle_w
