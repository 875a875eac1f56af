"""What a plan cannot beat, without simulating it: times of a request that is alone, and what a replica serves when its
batch is as full as its memory allows. Optimistic by construction, so that what fails here fails for certain.
"""

from __future__ import annotations

from dataclasses import dataclass

from headrace.core.config import EngineSettings
from headrace.sim.cost.analytic import Analytic
from headrace.sim.cost.batch import Batch, Spans, batch_of, windows_of
from headrace.sim.plan.space import Plan, Refused
from headrace.sim.plan.traffic import Demand
from headrace.sim.scenario import convention, placement

MARGIN = 1.05  # a bound must be missed by this before it counts: steps are discrete, means are not


@dataclass(frozen=True, slots=True)
class Limits:
    """The best that could come of a plan."""

    ttft_kept: float  # at most this share of the requests can keep the promise about the first token
    tpot_kept: float
    e2e_s: float  # at least, on average
    capacity: float  # at most, requests per second of one replica
    joules_per_token: float  # at least, of the fullest steps; idle time comes on top


def limits(plan: Plan, engine: EngineSettings, demand: Demand) -> Limits:
    """Of a plan that fits."""
    settings = plan.simulate
    where = placement(settings)
    cost = Analytic(where, convention(settings), host_s=settings.host_ms / 1000)
    windows, slo = windows_of(where.shape), demand.slo
    firsts, tokens = [], []
    for own, prompt, output in demand.pairs:
        firsts.append(cost.estimate(batch_of([(prompt - own, own)], 1, windows)).seconds)
        tokens.append((cost.estimate(batch_of([(prompt, 1)], 1, windows)).seconds, output))
    count = len(demand.pairs)
    late = sum(first_s > MARGIN * slo.ttft_s for first_s in firsts) if slo and slo.ttft_s else 0
    slow = sum(each > MARGIN * slo.tpot_s for each, output in tokens if output > 1) if slo and slo.tpot_s else 0
    alone_s = sum(firsts) / count + sum(each * (output - 1) for each, output in tokens) / count
    room = where.kv_tokens(settings.memory_use) / (demand.prompt_tokens + demand.output_tokens / 2)
    full = max(1.0, min(float(engine.max_running), room))
    step = cost.estimate(steady(demand, full, windows))
    served = full / (max(demand.output_tokens, 1.0) * step.seconds)
    return Limits(1 - late / count, 1 - slow / count, alone_s, MARGIN * served, step.joules / full / MARGIN)


def steady(demand: Demand, running: float, windows: tuple[int, ...]) -> Batch:
    """The mean step when so many requests decode and the prompts of those that follow are computed beside them."""
    context = demand.prompt_tokens + demand.output_tokens / 2
    prompts = running * demand.own_tokens / max(demand.output_tokens, 1.0)
    reads = [min(context, window) for window in (float("inf"), *windows)]
    full, *rest = (
        Spans(prompts * min(demand.prompt_tokens, one) / 2, prompts, running * one, growing=round(running))
        for one in reads
    )
    rows = round(running)
    return Batch(rows, running + prompts, rows, running, prompts * demand.prompt_tokens / 2, full, tuple(rest), context)


def hopeless(plan: Plan, bound: Limits, demand: Demand) -> Refused | None:
    """Promises that even a request alone would break, and traffic that outgrows the plan before it ends."""
    attain, slo = plan.simulate.attain, demand.slo
    if slo is None:
        return None
    if bound.ttft_kept < attain:
        late = f"alone on it, {1 - bound.ttft_kept:.0%} of the prompts take longer than {slo.ttft_s:g} s"
        return Refused(plan, "first tokens too late", late)
    if bound.tpot_kept < attain:
        slow = f"alone on it, {1 - bound.tpot_kept:.0%} of the requests wait longer than {slo.tpot_s:g} s for a token"
        return Refused(plan, "tokens too slow", slow)
    most = bound.capacity * plan.simulate.replicas
    backlog_s = (demand.requests / most - demand.span_s) * attain  # that those wait who come when all but 1 - p have
    if slo.ttft_s and backlog_s > slo.ttft_s + bound.e2e_s:
        few = f"serves at most {most:.3g} of {demand.rate:.3g} requests/s"
        return Refused(plan, "too few devices for the traffic", few)
    return None


def least_replicas(plan: Plan, bound: Limits, demand: Demand) -> int:
    """Fewer cannot keep up."""
    room = plan.simulate.replicas
    fits = (n for n in range(1, room + 1) if hopeless(plan.of(n), bound, demand) is None)
    return next(fits, room)
