"""What a server counts: requests, their time, and the share of it that models take."""

from __future__ import annotations

import bisect
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from graphcache.extras import optional
from graphcache.serving.limits import Gate

BOUNDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
"""Upper bounds of the histogram, in seconds."""

UNKNOWN = "(unknown)"
"""The label of every name that is not served, so that nobody can make series by asking."""


@dataclass
class _Account:
    """Of one model."""

    outcomes: dict[str, int] = field(default_factory=dict)
    buckets: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))
    seconds: float = 0.0
    queued: float = 0.0
    answered: int = 0
    answered_seconds: float = 0.0
    answered_queued: float = 0.0
    model_seconds: float = 0.0


class ServerMetrics:
    """Counts requests; read in the text form of Prometheus."""

    def __init__(self, names: Callable[[], Sequence[str]], gate: Gate) -> None:
        self._names = names
        self._gate = gate
        self._accounts: dict[str, _Account] = {}
        self._lock = threading.Lock()

    def count(self, model: str, outcome: str, *, seconds: float, queued: float, model_seconds: float) -> None:
        """Count one request."""
        label = model if model in self._names() else UNKNOWN
        with self._lock:
            account = self._accounts.setdefault(label, _Account())
            account.outcomes[outcome] = account.outcomes.get(outcome, 0) + 1
            account.buckets[bisect.bisect_left(BOUNDS, seconds)] += 1
            account.seconds += seconds
            account.queued += queued
            if outcome == "ok":
                account.answered += 1
                account.answered_seconds += seconds
                account.answered_queued += queued
                account.model_seconds += model_seconds

    def model_share(self, model: str) -> float | None:
        """The share of the time of answered requests that the backend took; ``None`` before the first of them."""
        with self._lock:
            account = self._accounts.get(model)
            if account is None or not account.answered_seconds:
                return None
            return account.model_seconds / account.answered_seconds

    def statistics(self, model: str) -> dict[str, Any]:
        """The same counts as Triton's extension for statistics has them, with times in nanoseconds.

        What is neither waiting nor in the model is left for its readers to subtract: the times of its ``compute_input``
        and ``compute_output`` are 0. Versions of a model are counted together.
        """
        with self._lock:
            account = self._accounts.get(model, _Account())
            count = account.answered
            failed = sum(account.outcomes.values()) - count
            times = {
                "success": (count, account.answered_seconds),
                "fail": (failed, account.seconds - account.answered_seconds),
                "queue": (count, account.answered_queued),
                "compute_input": (count, 0.0),
                "compute_infer": (count, account.model_seconds),
                "compute_output": (count, 0.0),
            }
        stats = {
            name: {"count": number, "ns": max(0, round(1e9 * seconds))} for name, (number, seconds) in times.items()
        }
        return {"inference_count": count, "execution_count": count, "inference_stats": stats, "batch_stats": []}

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        client = optional("prometheus_client", "/metrics")
        registry = client.CollectorRegistry()
        registry.register(self)
        text: bytes = client.generate_latest(registry)
        return text

    def describe(self) -> list[Any]:
        """Nothing: names are not looked for before the first scrape."""
        return []

    def collect(self) -> Iterator[Any]:
        """The metrics as they are now."""
        core = optional("prometheus_client.core", "/metrics")
        requests = core.CounterMetricFamily("graphcache_requests", "Requests for inference.", labels=_BY_OUTCOME)
        whole = core.HistogramMetricFamily(
            "graphcache_request_seconds", "From the arrival of a request to its answer.", labels=["model"]
        )
        queued = core.CounterMetricFamily(
            "graphcache_queue_seconds", "Time that requests waited for their turn.", labels=["model"]
        )
        inside = core.SummaryMetricFamily(
            "graphcache_model_seconds", "Time of answered requests in the model.", labels=["model"]
        )
        share = core.GaugeMetricFamily(
            "graphcache_model_share", "Share of the time of answered requests that the model took.", labels=["model"]
        )
        with self._lock:
            for label, account in self._accounts.items():
                for outcome, count in account.outcomes.items():
                    requests.add_metric([label, outcome], count)
                whole.add_metric([label], _cumulative(account.buckets), account.seconds)
                queued.add_metric([label], account.queued)
                inside.add_metric([label], account.answered, account.model_seconds)
                if account.answered_seconds:
                    share.add_metric([label], account.model_seconds / account.answered_seconds)
        yield from (requests, whole, queued, inside, share)
        yield core.GaugeMetricFamily("graphcache_requests_running", "Requests that run.", value=self._gate.running)
        yield core.GaugeMetricFamily("graphcache_requests_waiting", "Requests that wait.", value=self._gate.waiting)


def outcome_of(status: int) -> str:
    """The outcome of a request by the status of its answer."""
    if status < 400:
        return "ok"
    named = {408: "timeout", 504: "timeout", 503: "unavailable"}
    return named.get(status, "refused" if status < 500 else "failed")


_BY_OUTCOME = ["model", "outcome"]


def _cumulative(buckets: Sequence[int]) -> list[tuple[str, float]]:
    found, total = [], 0
    for bound, count in zip((*map(str, BOUNDS), "+Inf"), buckets, strict=True):
        total += count
        found.append((bound, float(total)))
    return found
