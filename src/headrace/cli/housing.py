"""What `headrace serve` builds before it listens: every model opened, the one ledger divided, a host for all."""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import math
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from headrace.cli.assemble import (
    Phases,
    asked,
    for_lanes,
    grammars_of,
    looked_at,
    name_of,
    open_embedding,
    show,
    text_of,
)
from headrace.cli.house import WORKER, Apart, Door, Known, ModelHouse, Opened, Within
from headrace.cli.recordings import Both, Recordings
from headrace.core import config
from headrace.core.config import BadSetting, DeviceSettings, EngineSettings, GatewaySettings, ModelsSettings
from headrace.core.explain.fold import Explanations
from headrace.core.facts import EncoderFacts, Expected, LoadFacts
from headrace.core.ports import Encoder, Encoding
from headrace.core.types import HeadraceError, Unavailable
from headrace.device.apart import ApartExecutor
from headrace.device.child import Child, Launch
from headrace.device.nursery import Nursery, possible
from headrace.device.wire import Load, Seen
from headrace.engine.host import Host
from headrace.engine.residence import Residence, Terms

if TYPE_CHECKING:
    from headrace.gateway.text import Text

LOG = logging.getLogger("headrace")
_CPU_SHARE, _CUDA_SHARE = 0.8, 0.9  # of what is free at the start, for all models together


@dataclass(frozen=True, slots=True)
class Beside:
    """An embedding model, as far as the gateway has to know it."""

    encoder: Encoder
    tokenizer_json: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Housing:
    """All models of one server."""

    houses: Mapping[str, ModelHouse]
    host: Host
    explanations: Explanations
    embedding: Beside | None
    door: Door  # to be closed at the end

    @property
    def first(self) -> ModelHouse:
        return next(iter(self.houses.values()))


class FirstModelsEncoder:
    """The embedding model in the process of the first model, which comes into memory if it is not there."""

    def __init__(self, host: Host, house: ModelHouse, encoding: Encoding) -> None:
        self._host = host
        self._house = house
        self._encoding = encoding

    @property
    def encoding(self) -> Encoding:
        return self._encoding

    async def encode(self, sequences: Sequence[Sequence[int]]) -> list[bytes]:
        async with self._host.using(self._house.known.name):
            opened = self._house.opened
            assert opened is not None and isinstance(opened.executor, ApartExecutor)
            return await opened.executor.encode(sequences)


def open_housing(
    args: argparse.Namespace,
    toml: Mapping[str, Any],
    phase: Phases,
    settings: GatewaySettings,
    recordings: Recordings,
) -> Housing:
    """Open every model that the command line names. Raises HeadraceError. A model that is alone, in a process of its
    own, is loaded; of others, nothing is yet."""
    sharing = config.load(ModelsSettings, args, toml)
    engine = config.load(EngineSettings, args, toml)
    device = for_lanes(engine, config.load(DeviceSettings, args, toml))
    many, apart = len(args.models) > 1, settings.engine == "process"
    if many and recordings.active:
        raise BadSetting("a recording is of one model; serve one, or leave out --record and --record-plans")
    named = named_models(args.models, settings)
    beside = settings.embedding_model if settings.embedding_model not in ("none", "") else None
    loads = [asked(model, engine, device, beside if apart and not at else None) for at, (_, model) in enumerate(named)]
    sized, opened, nursery = many or sharing.memory is not None, None, None
    if apart and not sized:
        known, opened = open_alone(named[0][0], loads[0], engine, settings, phase)
        models, encoder = [known], opened.loaded.encoder
    else:
        nursery = Nursery((*WORKER, "nursery")) if apart and possible() else None
        seen = look(loads, named, Launch(WORKER, loads[0], nursery) if apart else None, phase)
        models = [
            known_of(called, load, one, engine, settings, many)
            for (called, _), load, one in zip(named, loads, seen, strict=True)
        ]
        encoder = seen[0].encoder
    phase.done()
    door: Door = Apart(nursery) if apart else Within(_one_thread())
    return _house(models, door, opened, encoder, sharing, settings, recordings, sized, phase)


def _house(
    models: Sequence[Known],
    door: Door,
    opened: Opened | None,
    encoder: EncoderFacts | None,
    sharing: ModelsSettings,
    settings: GatewaySettings,
    recordings: Recordings,
    sized: bool,
    phase: Phases,
) -> Housing:
    turn = asyncio.Lock() if len(models) > 1 and models[0].engine.lanes == "one" else None
    explanations = Explanations(settings.explained)
    houses = {
        known.name: ModelHouse(
            known,
            door,
            Both(known.metrics, explanations.observer(known.name)),
            sized,
            recordings.watched,
            turn,
            opened,
        )
        for known in models
    }
    if len(houses) < len(models):
        raise BadSetting("two models have the same name; give one another with NAME=MODEL")
    ledger = residence(models, sharing, sized, pinned=recordings.active)
    most_waiting = (models[0].engine.max_queue_requests, models[0].engine.max_queue_tokens)
    host = Host(houses, ledger, most_waiting, LOG.info, lambda name, share: show(f"load {name}", share))
    first = houses[models[0].name]
    beside = _embedding(door, host, first, encoder, settings, phase)
    return Housing(houses, host, explanations, beside, door)


def _one_thread() -> ThreadPoolExecutor:
    from headrace.device.executor import one_thread

    gc.collect()
    gc.freeze()  # all of this stays, so what looks for garbage after a model has gone need not look here
    return one_thread()


def _embedding(
    door: Door, host: Host, first: ModelHouse, encoder: EncoderFacts | None, settings: GatewaySettings, phase: Phases
) -> Beside | None:
    """Where the models compute, so that it never computes at once with them."""
    if encoder is not None:
        return Beside(FirstModelsEncoder(host, first, encoder.encoding), encoder.tokenizer_json, encoder.nbytes)
    if not isinstance(door, Within) or settings.embedding_model in ("none", ""):
        return None
    found = open_embedding(settings.embedding_model, first.known.expected.device, phase)
    if found is None:
        return None
    return Beside(found[0].on(door.thread), found[1], found[0].nbytes)


def open_alone(
    name: str | None, what: Load, engine: EngineSettings, settings: GatewaySettings, phase: Phases
) -> tuple[Known, Opened]:
    """The one model of a server, in a process. This one never imports torch: its words are read while the weights
    are."""
    executor = ApartExecutor(Launch(WORKER, what))
    with ThreadPoolExecutor(1) as words:
        texts: list[Future[Text]] = []
        loaded = executor.start(phase, lambda facts: texts.append(words.submit(text_of, facts, settings)))
        text = texts[0].result()
    assert executor.model is not None
    called = name or name_of(what.model, executor.model)
    known = Known(called, executor.model, text, grammars_of(text), engine, what, _as_loaded(loaded))
    return known, Opened(executor, loaded)


def _as_loaded(loaded: LoadFacts) -> Expected:
    memory = loaded.memory
    sizes = (memory.weights, memory.activations, memory.kv, memory.kv)
    return Expected(*sizes, loaded.capacity, loaded.dtype, loaded.device, memory.free, loaded.process)


def look(
    loads: Sequence[Load], named: Sequence[tuple[str | None, str]], launch: Launch | None, phase: Phases
) -> list[Seen]:
    """What the models are, and what they will take, in a process that is launched, or in this one."""
    phase(f"open {', '.join(model for _, model in named)}")
    if launch is None:
        return [Seen(*looked_at(what)) for what in loads]
    child = Child(launch)
    try:
        return child.look(loads)
    finally:
        child.kill()
        child.end()


def known_of(
    called: str | None, what: Load, seen: Seen, engine: EngineSettings, settings: GatewaySettings, several: bool
) -> Known:
    """Of several models, some may have less than --max-context; one alone is refused then, when it is loaded."""
    expected = seen.expected
    if several and what.device.max_context is not None:
        device = replace(what.device, max_context=expected.capacity.max_context_tokens)
        what = msgspec.structs.replace(what, device=device)
    text = text_of(seen.facts, settings)
    name = called or name_of(what.model, seen.facts)
    return Known(name, seen.facts, text, grammars_of(text), engine, what, expected)


def named_models(arguments: Sequence[str], settings: GatewaySettings) -> list[tuple[str | None, str]]:
    """(name or None, model) of each argument, MODEL or NAME=MODEL."""
    if settings.served_name and len(arguments) > 1:
        raise BadSetting("--served-name is for one model; name several as NAME=MODEL")
    found: list[tuple[str | None, str]] = []
    for argument in arguments:
        match = re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9._:/-]{0,127})=(.+)", argument)
        alone = match is None or Path(argument).exists()
        found.append((settings.served_name, argument) if alone or match is None else (match[1], match[2]))
    return found


def residence(models: Sequence[Known], sharing: ModelsSettings, sized: bool, pinned: bool = False) -> Residence:
    """The ledger of all models. Raises BadSetting for a pin without a model."""
    pins = {name.strip() for name in sharing.pin.split(",") if name.strip()}
    if unknown := pins - {known.name for known in models}:
        raise BadSetting(f"--pin names {', '.join(sorted(unknown))}, which is not among the models")
    keep_alive_s = math.inf if sharing.keep_alive_s is None else sharing.keep_alive_s
    terms = {known.name: Terms(known.sizes, keep_alive_s, pinned or known.name in pins) for known in models}
    patience_s = sharing.swap_patience_s if sharing.swap == "throughput" else 0.0
    return Residence(terms, budget(sharing, models[0].expected) if sized else math.inf, patience_s, sharing.keep_kv)


def budget(sharing: ModelsSettings, expected: Expected) -> int:
    """Bytes for all models, less what their processes have in common."""
    share = _CPU_SHARE if expected.device == "cpu" else _CUDA_SHARE
    whole = sharing.memory if sharing.memory is not None else int(share * expected.free)
    return whole - expected.shared


async def load_first(host: Host) -> None:
    """Have the first model, and those that never go, in memory before anybody asks. Raises what a person at the
    terminal can do something about."""
    first = next(iter(host.models))
    for name in dict.fromkeys((first, *(name for name in host.models if host.residence.pinned(name)))):
        try:
            await host.models[name].load()
        except Unavailable as refusal:
            error: BaseException = refusal
            while isinstance(error.__cause__, HeadraceError):
                error = error.__cause__
            raise error from None
