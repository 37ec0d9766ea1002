"""The gateway's Prometheus metrics, in a registry of their own so that two gateways can live in one process.

    metrics = Metrics()
    metrics.request_started()
    metrics.token_gap(0.012)
    metrics.request_finished("OK", model="smollm2", method="Generate", usage=usage, timings=timings, receipt=receipt)
    metrics.render()  # what /metrics answers

Labels take values from closed sets only (served models, RPC methods, codes, workers), never from a client.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from tandem.v1 import types_pb2, worker_pb2

CONTENT_TYPE = CONTENT_TYPE_LATEST

# seconds; from one decode step of a large GPU to a long prompt on a small CPU
_TOKEN_BUCKETS = (0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2, 5)
_FIRST_TOKEN_BUCKETS = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25, 0.5, 0.75, 1, 2, 5, 10, 20, 60, 120)
_REQUEST_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300, 600)
_HANDOFF_BUCKETS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 5)

_LOAD_GAUGES = {
    "running": "requests that hold blocks",
    "waiting": "requests that wait for blocks",
    "free_blocks": "blocks that are free or only cached",
    "total_blocks": "blocks that requests can use",
    "allocated_blocks": "blocks held by requests",
    "queued_tokens": "prompt tokens still to compute",
    "draining": "1 while the worker admits no new request",
}


class Metrics:
    """Counters, gauges and histograms; every name begins with `tandem_`. The methods are cheap and never raise."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        # the gateway's own CPU seconds, resident bytes and open file descriptors
        ProcessCollector(namespace="tandem_gateway", registry=registry)

        def counter(name: str, help_text: str, *labels: str) -> Counter:
            return Counter(f"tandem_{name}", help_text, labels, registry=registry)

        def gauge(name: str, help_text: str, *labels: str) -> Gauge:
            return Gauge(f"tandem_{name}", help_text, labels, registry=registry)

        def histogram(name: str, help_text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"tandem_{name}", help_text, labels, buckets=buckets, registry=registry)

        self._requests = counter("requests", "requests that ended, by gRPC code", "model", "method", "code")
        self._http = counter("http_requests", "HTTP requests answered, by route and status", "route", "status")
        self._running = gauge("requests_running", "requests in progress")
        self._queued = gauge("requests_queued", "requests waiting for admission")
        gauge("tasks", "asyncio tasks of the gateway").set_function(_num_tasks)

        self._first_token = histogram(
            "time_to_first_token_seconds", "from arrival to the first token", _FIRST_TOKEN_BUCKETS
        )
        self._gap = histogram("inter_token_seconds", "between two chunks of one output", _TOKEN_BUCKETS)
        self._per_token = histogram(
            "time_per_output_token_seconds", "mean of a request's decode time per token after the first", _TOKEN_BUCKETS
        )
        self._total = histogram("request_seconds", "from arrival to the last token or vector", _REQUEST_BUCKETS)
        self._phase = histogram("request_phase_seconds", "time of a request in a phase", _FIRST_TOKEN_BUCKETS, "phase")

        self._prompt_tokens = counter("prompt_tokens", "tokens of prompts")
        self._cached_tokens = counter("cached_tokens", "prompt tokens whose KV came from a prefix cache")
        self._completion_tokens = counter("completion_tokens", "tokens generated")

        self._handoff_bytes = counter("handoff_bytes", "bytes of KV copied between workers", "transport")
        self._handoff = histogram(
            "handoff_seconds", "from the first token to the last imported block", _HANDOFF_BUCKETS, "transport"
        )
        self._attempts = counter("handoff_attempts", "handoffs started")
        self._preemptions = counter("preemptions", "times a request gave its blocks up and came back")

        self._pair = gauge(
            "kv_pair",
            "1 for two workers that hand over, with their transport and why it is no better one",
            "decode_worker",
            "prefill_worker",
            "transport",
            "refused",
        )
        self._pairs: dict[tuple[str, str], tuple[str, ...]] = {}  # decode and prefill worker: the labels

        self._worker_up = gauge("worker_up", "1 while the worker reports its load", "worker", "role")
        self._load = {
            name: gauge(f"worker_{name}", help_text, "worker", "role") for name, help_text in _LOAD_GAUGES.items()
        }

    def request_started(self) -> None:
        """A request was admitted."""
        self._running.inc()

    def request_finished(
        self,
        code: str,
        *,
        model: str,
        method: str = "Generate",
        usage: types_pb2.Usage | None = None,
        timings: types_pb2.Timings | None = None,
        receipt: types_pb2.Receipt | None = None,
        num_outputs: int = 1,
    ) -> None:
        """A started request ended. `code` is the name of its gRPC status; `model` a served name or empty."""
        self._running.dec()
        self._requests.labels(model, method, code).inc()
        if usage is not None:
            self._prompt_tokens.inc(usage.prompt_tokens)
            self._cached_tokens.inc(usage.cached_tokens)
            self._completion_tokens.inc(usage.completion_tokens)
        if receipt is not None:
            self._attempts.inc(receipt.attempts)
            self._preemptions.inc(receipt.preemptions)
        if timings is not None and code == "OK":
            self._observe_timings(timings, generated=method == "Generate")
            if usage is not None and usage.completion_tokens > num_outputs:
                self._per_token.observe(timings.decode_s / (usage.completion_tokens / num_outputs - 1))
        if receipt is not None and receipt.transport:
            transport = transport_name(receipt.transport)
            self._handoff_bytes.labels(transport).inc(receipt.handoff_bytes)
            if timings is not None:
                self._handoff.labels(transport).observe(timings.handoff_s)

    def request_refused(self, code: str, *, model: str = "", method: str = "Generate") -> None:
        """A request ended before it started: not valid, or no place for it."""
        self._requests.labels(model, method, code).inc()

    def set_queued(self, num_requests: int) -> None:
        """How many requests wait for admission."""
        self._queued.set(num_requests)

    def token_gap(self, seconds: float) -> None:
        """Time since the output's chunk before this one."""
        self._gap.observe(seconds)

    def set_worker_load(self, worker_id: str, role: str, load: worker_pb2.WatchLoadResponse) -> None:
        """What a worker reported; role is "prefill" or "decode"."""
        self._worker_up.labels(worker_id, role).set(1)
        for name, gauge in self._load.items():
            gauge.labels(worker_id, role).set(getattr(load, name))

    def set_pair(
        self,
        decode_id: str,
        prefill_id: str,
        transport: types_pb2.Transport.ValueType,
        refusals: Sequence[types_pb2.TransportRefusal],
    ) -> None:
        """What two workers agreed on; "none" if they cannot hand over."""
        self.remove_pair(decode_id, prefill_id)
        refused = "; ".join(f"{transport_name(r.transport)}: {r.reason}" for r in refusals)
        labels = self._pairs[decode_id, prefill_id] = (decode_id, prefill_id, transport_name(transport), refused)
        self._pair.labels(*labels).set(1)

    def remove_pair(self, decode_id: str, prefill_id: str) -> None:
        """One of the two is gone."""
        if labels := self._pairs.pop((decode_id, prefill_id), None):
            self._pair.remove(*labels)

    def remove_worker(self, worker_id: str, role: str) -> None:
        """A worker is gone: its series end, so that a restarted one does not leave a frozen twin behind."""
        for gauge in (self._worker_up, *self._load.values()):
            gauge.remove(worker_id, role)

    def http_finished(self, route: str, status: int) -> None:
        """An HTTP request was answered."""
        self._http.labels(route, str(status)).inc()

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def _observe_timings(self, timings: types_pb2.Timings, *, generated: bool) -> None:
        if generated:
            self._first_token.observe(timings.first_token_s)
        self._total.observe(timings.total_s)
        for phase in ("queue", "prefill", "decode") if generated else ("queue", "prefill"):
            self._phase.labels(phase).observe(getattr(timings, f"{phase}_s"))


def transport_name(transport: types_pb2.Transport.ValueType) -> str:
    """The short name of a transport: "shared_memory", "inline" and so on; "none" when nothing was handed over."""
    name = types_pb2.Transport.Name(transport).removeprefix("TRANSPORT_").lower()
    return "none" if name == "unspecified" else name


def _num_tasks() -> int:
    """Of the running event loop, which is where /metrics is rendered; 0 without one."""
    try:
        return len(asyncio.all_tasks())
    except RuntimeError:
        return 0
