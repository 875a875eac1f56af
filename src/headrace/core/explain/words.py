"""An explanation in English, sentence by sentence, in the order of what happened. The one place for these words: the
API, the page, `headrace top`, the log and the simulator say them all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from headrace.core.explain import seen
from headrace.core.explain.record import PREFILL, QUEUE
from headrace.core.explain.told import Cause, Explanation, Other, Phase, Times, Yield

_NOTABLE_S = 0.005  # what is shorter explains nothing
_MISSED = {
    seen.FIRST: "this text had not been sent before",
    seen.EVICTED: "it had been in the cache and had to make room",
    seen.UNDER_WAY: "the same text was still being computed for another request",
    seen.OTHER_SALT: "the same beginning was sent before with another cache salt, model or adapter",
    seen.NOT_ASKED: "this request reads no cache, because it is off or logprobs of the prompt were asked for",
    seen.UNNAMED: "the prompt fills no block that could be shared",
}
_FINISH = {
    "stop": "It ended where the model, a stop string or a complete answer ended it.",
    "length": "It ended because it had as many tokens as it was allowed.",
    "abort": "It ended because the client went away or cancelled it, or because the server was stopped.",
    "deadline": "It ended unfinished because its deadline had come.",
    "error": "It ended because a step failed; the server's log says why.",
    "invalid": "It ended because it could not be served as it was.",
}
_PREEMPTED = {"memory": "memory ran out", "a request that waits": "a request with a better claim waited"}


def seconds(value: float) -> str:
    """'1.84 s', '96 ms', '0.8 ms'."""
    if value >= 10:
        return f"{value:,.1f} s"
    if value >= 0.995:
        return f"{value:.2f} s"
    return f"{1e3 * value:.0f} ms" if value >= 0.00995 else f"{1e3 * value:.1f} ms"


def count(number: int, what: str) -> str:
    """'1 request', '3 requests', '6,000 tokens'."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def tell(one: Explanation) -> list[str]:
    """Sentences, in the order of what happened."""
    told: list[str] = []
    yields = iter(one.yields)
    first = True
    for phase in one.phases:
        if phase.kind == QUEUE:
            if not first and (what := next(yields, None)) is not None:
                told.append(_yielded(what))
            told += _queued(one, phase, first)
            first = False
        elif phase.kind == PREFILL:
            told += _prefilled(one, phase)
        else:
            told += _decoded(phase)
    told += _answered(one)
    return told


LOADING = "its model to be loaded"


def loaded(before_s: float, *, waits: bool) -> list[str]:
    """Of a request whose model was not in memory when it came, and which was queued `before_s` later, if it was."""
    waited = "It has waited" if waits else "It waited"
    return [f"{waited} {seconds(before_s)} for {LOADING}."] if before_s >= _NOTABLE_S or waits else []


def _queued(one: Explanation, phase: Phase, first: bool) -> Iterator[str]:
    waits = one.state == "waiting" and phase is one.phases[-1]
    if phase.seconds < _NOTABLE_S and not waits:
        if first:
            yield f"It was admitted at once, {seconds(phase.seconds)} after it came."
        return
    behind = f" behind {count(one.ahead, 'request')}" if first and one.ahead else ""
    behind += "" if behind or not first or not one.running else f" while {count(one.running, 'request')} ran"
    begin = "It has waited" if waits else "It waited"
    again = "" if first else " to go on"
    reasons = list(_reasons(phase))
    why = ": " + ", ".join(reasons) if reasons else ""
    yield f"{begin} {seconds(phase.seconds)} in the queue{behind}{again}{why}."


def _reasons(phase: Phase) -> Iterator[str]:
    """Why somebody stood in the queue."""
    if phase.prompts_s >= _NOTABLE_S:
        yield f"{_part(phase.prompts_s, phase.seconds)} while {_prompts(phase)} computed"
    for held_s, what in (
        (phase.places_s, "all places for running requests were taken"),
        (phase.memory_s, "too little memory for KV was free"),
        (phase.policy_s, "the admission policy held it back"),
    ):
        if held_s >= _NOTABLE_S:
            yield f"{_part(held_s, phase.seconds)} because {what}"


def _part(some_s: float, whole_s: float) -> str:
    return "all of it" if some_s >= 0.98 * whole_s else f"{seconds(some_s)} of it"


def _prompts(phase: Phase) -> str:
    """'a prompt of 6,000 tokens of another tenant was', 'prompts of other tenants were'."""
    main = phase.causes[0] if phase.causes else None
    if main is not None and main.seconds >= 0.8 * phase.prompts_s:
        return f"{_prompt(main.other)} was"
    others_s = phase.others_prompts_s
    whose = ""
    if others_s >= 0.8 * phase.prompts_s:
        whose = " of other tenants"
    elif others_s >= _NOTABLE_S:
        whose = f", for {seconds(others_s)} of other tenants,"
    longest = f", the longest {_of(main)}," if main is not None else ""
    return f"prompts of other requests{whose}{longest} were".replace(",,", ",")


def _of(cause: Cause | None) -> str:
    return "" if cause is None else f"{_prompt(cause.other)} for {seconds(cause.seconds)}"


def _prompt(other: Other) -> str:
    size = "" if other.prompt_tokens is None else f" of {count(other.prompt_tokens, 'token')}"
    return f"a prompt{size} of {whose(other)}"


def whose(other: Other) -> str:
    """'another tenant', 'tenant alice (chatcmpl-1)', 'another request of yours (chatcmpl-2)'."""
    if other.tenant:
        return f"tenant {other.tenant} ({other.request_id})"
    if other.whose == "other":
        return "another tenant"
    return f"another request ({other.request_id})" if other.request_id else "another request"


def _prefilled(one: Explanation, phase: Phase) -> Iterator[str]:
    end_s = phase.begin_s + phase.seconds
    chunks = [chunk for chunk in one.chunks if chunk.begin_s < end_s and chunk.begin_s + chunk.seconds > phase.begin_s]
    steps, tokens = sum(chunk.steps for chunk in chunks), sum(chunk.tokens for chunk in chunks)
    first = phase is next(other for other in one.phases if other.kind == PREFILL)
    if first:
        yield _found(one)
    what = f"{count(tokens, 'token')} {'of the prompt' if first else 'of what it had before'}"
    doing = "was" if tokens == 1 else "were"
    so_far = " so far" if phase is one.phases[-1] and one.finish is None else ""
    more = ""
    if phase.prompts_s >= max(_NOTABLE_S, 0.05 * phase.seconds):
        more = f"; {seconds(min(phase.prompts_s, phase.seconds))} of that went to {_beside(phase)}"
    yield f"{what} {doing} computed in {count(steps, 'step')}{so_far}, {seconds(phase.seconds)}{more}."


def _beside(phase: Phase) -> str:
    return _prompts(phase).removesuffix(" was").removesuffix(" were").removesuffix(",")


def _found(one: Explanation) -> str:
    if one.missed == seen.WHOLE:
        last = "; the last token is always computed" if one.cached_tokens else ""
        return f"Of its {count(one.prompt_tokens, 'prompt token')}, {one.cached_tokens:,} were in the cache{last}."
    found = f"{one.cached_tokens:,}" if one.cached_tokens else "none"
    why = _MISSED.get(one.missed, "")
    rest = "of the rest, " if one.cached_tokens and one.missed in (seen.FIRST, seen.OTHER_SALT) else ""
    return f"Of its {count(one.prompt_tokens, 'prompt token')}, {found} were in the cache" + (
        f": {rest}{why}." if why else "."
    )


def _decoded(phase: Phase) -> Iterator[str]:
    if phase.steps < 1:
        return
    each = f", {seconds(phase.seconds / phase.steps)} each" if phase.steps > 1 else ""
    more = ""
    if phase.slowed_s >= max(_NOTABLE_S, 0.02 * phase.seconds) and phase.steps_with_prompts:
        steps = count(phase.steps_with_prompts, "step")
        more = f"; {seconds(phase.slowed_s)} of it was lost in {steps} that also computed {_slowing(phase)}"
    yield f"It decoded in {count(phase.steps, 'step')}, {seconds(phase.seconds)}{each}{more}."


def _slowing(phase: Phase) -> str:
    main = phase.causes[0] if phase.causes else None
    if main is not None and main.seconds >= 0.8 * phase.slowed_s:
        return _prompt(main.other)
    others = phase.others_slowed_s >= 0.8 * phase.slowed_s
    longest = f", the worst {_of(main)}" if main is not None else ""
    return f"prompts of other {'tenants' if others else 'requests'}{longest}"


def _yielded(one: Yield) -> str:
    why = _PREEMPTED.get(one.reason, one.reason)
    to = f" and {_claimant(one.to)} went first" if one.to is not None else ""
    lost = f"; {count(one.lost_tokens, 'computed token')} had to be found or computed again" if one.lost_tokens else ""
    return f"After {seconds(one.at_s)} it was preempted because {why}{to}{lost}."


def _claimant(other: Other) -> str:
    return "a request of another tenant" if other.whose == "other" and not other.tenant else whose(other)


def _answered(one: Explanation) -> Iterator[str]:
    if one.preemptions > len(one.yields):
        yield f"It was preempted {one.preemptions:,} times altogether."
    if one.drafted_tokens:
        yield f"Of {count(one.drafted_tokens, 'guessed token')}, {one.accepted_tokens:,} were right."
    if one.finish is None:
        yield f"So far it has drawn {count(one.output_tokens, 'token')} in {seconds(one.total_s)}."
        return
    yield f"It drew {count(one.output_tokens, 'token')} in {seconds(one.total_s)} altogether."
    yield _FINISH.get(one.finish, f"It ended: {one.finish}.")


def text(one: Explanation) -> str:
    """All of it, for a terminal."""
    head = f"{one.id} ({one.model})" if one.model else one.id
    return head + "\n" + "".join(f"  {sentence}\n" for sentence in tell(one))


def short(spent: Times) -> str:
    """The main reason for a long wait, in a few words for the log; empty where it did not wait."""
    if spent.queue_s < _NOTABLE_S:
        return ""
    reasons: Sequence[tuple[float, str]] = (
        (spent.others_prompts_s, "prompts of other tenants"),
        (spent.waited_prompts_s - spent.others_prompts_s, "prompts of other requests"),
        (spent.places_s, "no place"),
        (spent.memory_s, "no memory"),
        (spent.policy_s, "admission"),
    )
    worst_s, why = max(reasons, key=lambda pair: pair[0])
    return why if worst_s >= _NOTABLE_S else ""
