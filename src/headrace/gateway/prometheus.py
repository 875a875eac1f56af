"""Metrics as Prometheus text. Counts come from `core.metrics`, what is true now from the service's status.

Names follow vLLM's after the prefix, with its label `model_name`. The prefix is `headrace:` because we are not vLLM and
the numbers should not be mistaken for its own; `--metrics-prefix vllm:` serves dashboards and autoscalers that ask
for those names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from headrace.core.metrics import Metrics
from headrace.core.ports import Service

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True, eq=False)  # the registry keys collectors by identity
class _Collected(Collector):
    """What Prometheus asks on every scrape."""

    metrics: Metrics
    service: Service
    model: str
    prefix: str

    def collect(self) -> Iterator[Metric]:
        yield from self._now()
        yield from self._counted()
        for name, histogram in self.metrics.histograms.items():
            family = HistogramMetricFamily(self.prefix + name, histogram.help, labels=["model_name"])
            family.add_metric([self.model], [*histogram.cumulative()], histogram.sum)
            yield family

    def _now(self) -> Iterator[Metric]:
        status = self.service.status()
        yield self._gauge("num_requests_running", "Requests being computed.", status.running)
        yield self._gauge("num_requests_waiting", "Requests in the queue.", status.waiting)
        yield self._gauge("num_tokens_waiting", "Prompt tokens in the queue.", status.waiting_tokens)
        used = status.used_blocks / max(1, status.capacity.blocks)
        yield self._gauge("kv_cache_usage_perc", "Part of the KV blocks in use, 0 to 1.", used)
        yield self._gauge("ready", "1 while new requests are taken.", float(status.state == "ready"))

    def _counted(self) -> Iterator[Metric]:
        counts = self.metrics
        yield self._counter("num_preemptions", "Requests that had to yield their memory.", counts.preemptions)
        yield self._counter("prompt_tokens", "Prompt tokens of requests that drew a token.", counts.prompt_tokens)
        yield self._counter("generation_tokens", "Output tokens.", counts.output_tokens)
        yield self._counter("prefix_cache_queries", "Prompt tokens looked up.", counts.prefix_queries)
        yield self._counter("prefix_cache_hits", "Prompt tokens found.", counts.prefix_hits)
        yield self._counter("spec_decode_num_drafts", "Requests with guessed tokens, in each step.", counts.drafts)
        yield self._counter("spec_decode_num_draft_tokens", "Tokens guessed and verified.", counts.drafted_tokens)
        yield self._counter("spec_decode_num_accepted_tokens", "Guessed tokens drawn.", counts.accepted_tokens)
        yield self._counter("requests_rejected", "Requests refused because the queue was full.", counts.rejected)
        labels = ["model_name", "finished_reason"]
        family = CounterMetricFamily(self.prefix + "request_success", "Requests that ended, by reason.", labels=labels)
        for reason, count in sorted(counts.finished.items()):
            family.add_metric([self.model, reason], count)
        yield family

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(self.prefix + name, text, labels=["model_name"])
        family.add_metric([self.model], value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(self.prefix + name, text, labels=["model_name"])
        family.add_metric([self.model], value)
        return family


class Exposition:
    """The text of one scrape."""

    def __init__(self, metrics: Metrics, service: Service, model: str, prefix: str) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_Collected(metrics, service, model, prefix))

    def text(self) -> bytes:
        return generate_latest(self._registry)
