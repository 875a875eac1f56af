"""Instances for `plan roles` from the catalogue or from published coefficients, and its answer in words. Decides
nothing but which sizes there are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace

from headrace.core.config import BadSetting, EngineSettings
from headrace.core.ports import Capacity
from headrace.sim.cost.distserve import OPT_13B
from headrace.sim.cost.placement import BadPlacement
from headrace.sim.executor import MOST_STEPS
from headrace.sim.hardware import Link
from headrace.sim.models import model
from headrace.sim.plan.answer import Answer, Part
from headrace.sim.plan.files import plan_file
from headrace.sim.plan.roles import FIRST, METRICS, MOST, Instance, Phase, Roles
from headrace.sim.plan.space import divisors
from headrace.sim.run import Site
from headrace.sim.scenario import KVS, Scenario, parse_hardware, placement

ENDLESS = 1 << 40
PATIENT = {"max_queue_requests": ENDLESS, "max_queue_tokens": ENDLESS}  # who is refused breaks no promise about tokens
CHUNK = 512  # tokens of a step where published prices say nothing about how long one may be


def sizes(scenario: Scenario, link: Link | None, longest_prompt: int) -> Iterator[Instance]:
    """Every size of instance on the devices of one node that the model fits on. Raises BadPlacement if none."""
    topology = parse_hardware(scenario.simulate.hardware)
    found = 0
    for count in divisors(topology.devices_per_node):
        name = topology.device.name if count == 1 else f"{count}x{topology.device.name}"
        there = replace(scenario, simulate=replace(scenario.simulate, hardware=name))
        try:
            where, both = placement(there.simulate), _under(there, batch="chunked")
        except BadPlacement:
            continue
        found += 1
        budget = max(longest_prompt, CHUNK)
        first = _under(there, batch="prefill-first", token_budget=budget, prefix_cache=False)
        road = link or topology.device.peer
        yield Instance(count, first, first, (both, first), road, where.kv_bytes_per_token)
    if not found:
        raise BadPlacement(f"{scenario.simulate.model} does not fit on {scenario.simulate.hardware}, cut as one likes")


def _under(scenario: Scenario, **changes: object) -> Site:
    return replace(scenario, engine=replace(scenario.engine, **PATIENT, **changes)).site()  # type: ignore[arg-type]


def published(link: Link) -> list[Instance]:
    """OPT-13B on A100-80GB by the coefficients of DistServe's artifact: one and two devices."""
    kv_bytes, found = KVS["bf16"].bytes_per_token(model("opt-13b")), []
    for tensor, (cost, kv_tokens) in OPT_13B.items():
        capacity = Capacity(kv_tokens // 16, 16, 4096, 50_272, MOST_STEPS)

        def site(batch: str, budget: int, cost=cost, capacity=capacity) -> Site:  # type: ignore[no-untyped-def]
            engine = EngineSettings(batch=batch, token_budget=budget, max_running=256, prefix_cache=False)
            endless = replace(engine, max_queue_requests=ENDLESS, max_queue_tokens=ENDLESS)
            return Site(endless, capacity, cost, token_budget=budget)

        first = site("prefill-first", 8192)
        found.append(Instance(tensor, first, first, (site("chunked", CHUNK), first), link, kv_bytes / tensor))
    return found


# -- in words ----------------------------------------------------------------------------------------------------------


def answer(found: Roles, subject: str, scenario: Scenario | None) -> Answer:
    """`scenario` is what one replica for both jobs would be, for the plan file."""
    promise = found.promise
    lines = list(_headline(found))
    numbers = {
        "promise": asdict(promise),
        "phases": [asdict(one) for one in found.phases],
        "apart": None if found.apart is None else asdict(found.apart),
        "instances_for_rate": found.needed,
        "held_at_every_rate": found.endless,
        "apart_over_together_per_device": dict(zip(METRICS, found.pays, strict=True)),
        "apart_per_device_on_a_tenth_of_the_link": found.slow_link,
    }
    what = f"{promise.share:.0%} within {promise.ttft_s:g} s to the first token and {promise.token_s:g} s a token"
    return Answer(
        f"Roles for {subject}",
        lines,
        (
            Part("Instances, requests/s per device", f"Highest rates that keep {what}.", _rows(found)),
            Part("Apart or together", "Of whole placements, hand-off simulated.", _whole(found)),
        ),
        tuple(_rejected(found)),
        tuple(_sure(found, scenario is None)),
        (
            "goodput = highest rate at which the share of requests within the first promise and the share within the",
            "second are both enough; found to 1/20 by doubling and bisection, the same requests coming faster",
            "pair = argmax over sizes of prefill goodput / devices, and of decode goodput / devices",
            "counts = argmax of min(n x prefill, m x decode) / (n devices + m devices) for n, m up to 4",
            "KV's way = tokens x bytes of a token on one device / link + latency, one after the other into an instance",
        ),
        numbers,
        None if scenario is None else plan_file(scenario, lines),
    )


def _headline(found: Roles) -> Iterator[str]:
    mean, longest = found.pays
    if found.apart is None:
        yield "TOGETHER: no size keeps the promises in a role of its own."
        return
    one = found.apart
    n, m = one.counts
    named = f"{n} x prefill on {one.prefill.devices} and {m} x decode on {one.decode.devices}"
    verdict = "APART" if mean > 1 else "TOGETHER"
    yield (
        f"{verdict}: the best placement apart is {named} devices, {one.per_device(0):.3g} requests/s per device: "
        f"{mean:.2f} times one role for both."
    )
    if (mean > 1) != (longest > 1):
        yield (
            f"It depends on the metric: {mean:.2f} times by the mean time of a token, {longest:.2f} times by the "
            f"longest pause of each request."
        )
    elif mean <= 1:
        yield f"Separation does not pay: neither by the mean time of a token nor by the longest pause ({longest:.2f})."
    else:
        yield f"By the longest pause of each request it is {longest:.2f} times."
    if found.needed and found.rate:
        yield f"For {found.rate:g} requests/s: {found.needed[0]} prefill and {found.needed[1]} decode instances."


def _rows(found: Roles) -> list[list[str]]:
    rows = [["role, devices", "by the mean", "by the longest pause"]]
    for one in found.phases:
        named = {"both": "both"}.get(one.role, f"only {one.role}")
        rows.append([f"{named}, {one.devices}", *(f"{one.per_device(at):.3g}" for at in range(len(METRICS)))])
    return rows


def _whole(found: Roles) -> list[list[str]]:
    rows = [["placement", "devices", "by the mean", "by the longest pause"]]
    if found.apart:
        one = found.apart
        named = f"{one.counts[0]} x prefill on {one.prefill.devices}, {one.counts[1]} x decode on {one.decode.devices}"
        rows.append([named, f"{one.devices}", *(f"{one.per_device(at):.3g}" for at in range(len(METRICS)))])
    both = [one for one in found.phases if one.role == "both"]
    rows += [
        [f"both on {one.devices}", f"{one.devices}", *(f"{one.per_device(at):.3g}" for at in range(len(METRICS)))]
        for one in both
    ]
    return rows


def _rejected(found: Roles) -> Iterator[str]:
    chosen: set[tuple[str, int]] = set()
    if found.apart:
        chosen = {("prefill", found.apart.prefill.devices), ("decode", found.apart.decode.devices)}
    for one in found.phases:
        if one.role == "both" or (one.role, one.devices) in chosen:
            continue
        yield f"{one.role} on {one.devices}: {_why(one)}"


def _why(one: Phase) -> str:
    if not one.rates[0]:
        return "breaks its promise without any queue"
    return f"{one.per_device(0):.3g} requests/s per device are fewer"


def _sure(found: Roles, is_published: bool) -> Iterator[str]:
    yield (
        "Prices are the published coefficients of DistServe's engine; a step with a prompt is priced as prompts only."
        if is_published
        else "Prices are the cost model's at catalogue peaks; nothing was measured on such devices."
    )
    if found.apart and found.slow_link is not None:
        kept = found.slow_link / found.apart.per_device(0) if found.apart.per_device(0) else 0.0
        yield f"With a tenth of the link's bandwidth the placement keeps {kept:.0%} of its goodput."
    if found.endless:
        yield (
            f"NOT TO BE RELIED ON: some sizes kept the promises at every rate up to {MOST * FIRST:,.0f} requests/s."
            " The requests are over before a queue forms; ask with more --requests or longer --lengths."
        )
    yield "Goodputs are found to 5 %; a ratio between 0.9 and 1.1 is a draw, and so within 10 % of anything."
    yield "Preempted decodes and prefix caches of prefill instances are not modelled."


def slo_of(ttft_s: float | None, tpot_s: float | None) -> tuple[float, float]:
    """Raises BadSetting when one is missing."""
    if ttft_s is None or tpot_s is None:
        raise BadSetting("roles are judged by both promises; say them with --slo ttft=0.2,tpot=0.1")
    return ttft_s, tpot_s
