"""Metrics as Prometheus text. Counts come from `core.metrics`, what is true now from the service's status.

Names follow vLLM's after the prefix, with its label `model_name`. The prefix is `headrace:` because we are not vLLM and
the numbers should not be mistaken for its own; `--metrics-prefix vllm:` serves dashboards and autoscalers that ask
for those names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from headrace.gateway.models import Model

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True, eq=False)  # the registry keys collectors by identity
class _Collected(Collector):
    """What Prometheus asks on every scrape."""

    models: Sequence[Model]
    prefix: str

    def collect(self) -> Iterator[Metric]:
        yield from self._now()
        yield from self._counted()
        for name, histogram in self.models[0].metrics.histograms.items():
            family = HistogramMetricFamily(self.prefix + name, histogram.help, labels=["model_name"])
            for model in self.models:
                each = model.metrics.histograms[name]
                family.add_metric([model.name], [*each.cumulative()], each.sum)
            yield family

    def _now(self) -> Iterator[Metric]:
        now = [model.service.status() for model in self.models]
        yield self._gauge("num_requests_running", "Requests being computed.", [one.running for one in now])
        yield self._gauge("num_requests_waiting", "Requests in the queue.", [one.waiting for one in now])
        yield self._gauge("num_tokens_waiting", "Prompt tokens in the queue.", [one.waiting_tokens for one in now])
        used = [one.used_blocks / max(1, one.capacity.blocks) for one in now]
        yield self._gauge("kv_cache_usage_perc", "Part of the KV blocks in use, 0 to 1.", used)
        there = [model.residency for model in self.models]
        loaded = [float(one.state in ("ready", "yielding")) for one in there]
        yield self._gauge("model_loaded", "1 while the model is in memory.", loaded)
        yield self._gauge("model_memory_bytes", "Of the ledger.", [one.memory_bytes for one in there])
        yield self._gauge("ready", "1 while new requests are taken.", [float(one.state == "ready") for one in now])

    def _counted(self) -> Iterator[Metric]:
        yield self._counter("num_preemptions", "Requests that had to yield their memory.", "preemptions")
        yield self._counter("prompt_tokens", "Prompt tokens of requests that drew a token.", "prompt_tokens")
        yield self._counter("generation_tokens", "Output tokens.", "output_tokens")
        yield self._counter("prefix_cache_queries", "Prompt tokens looked up.", "prefix_queries")
        yield self._counter("prefix_cache_hits", "Prompt tokens found.", "prefix_hits")
        yield self._counter("spec_decode_num_drafts", "Requests with guessed tokens, in each step.", "drafts")
        yield self._counter("spec_decode_num_draft_tokens", "Tokens guessed and verified.", "drafted_tokens")
        yield self._counter("spec_decode_num_accepted_tokens", "Guessed tokens drawn.", "accepted_tokens")
        yield self._counter("requests_rejected", "Requests refused because the queue was full.", "rejected")
        labels = ["model_name", "finished_reason"]
        family = CounterMetricFamily(self.prefix + "request_success", "Requests that ended, by reason.", labels=labels)
        for model in self.models:
            for reason, count in sorted(model.metrics.finished.items()):
                family.add_metric([model.name, reason], count)
        yield family

    def _gauge(self, name: str, text: str, values: Sequence[float]) -> Metric:
        """One value per model."""
        family = GaugeMetricFamily(self.prefix + name, text, labels=["model_name"])
        for model, value in zip(self.models, values, strict=True):
            family.add_metric([model.name], value)
        return family

    def _counter(self, name: str, text: str, count: str) -> Metric:
        """`count` is what `core.metrics` calls it."""
        family = CounterMetricFamily(self.prefix + name, text, labels=["model_name"])
        for model in self.models:
            family.add_metric([model.name], getattr(model.metrics, count))
        return family


class Exposition:
    """The text of one scrape."""

    def __init__(self, models: Iterable[Model], prefix: str) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_Collected(tuple(models), prefix))

    def text(self) -> bytes:
        return generate_latest(self._registry)
