import pytest

from graphcache.errors import ExtraNotFoundError
from graphcache.serving.limits import Gate, Limits
from graphcache.serving.metrics import UNKNOWN, ServerMetrics, outcome_of

parser = pytest.importorskip("prometheus_client.parser")

NAMES = {
    "graphcache_requests_total",
    "graphcache_request_seconds_bucket",
    "graphcache_request_seconds_count",
    "graphcache_request_seconds_sum",
    "graphcache_queue_seconds_total",
    "graphcache_model_seconds_count",
    "graphcache_model_seconds_sum",
    "graphcache_model_share",
    "graphcache_requests_running",
    "graphcache_requests_waiting",
}
"""Dashboards and alerts name them: a name that changes here breaks them."""


def scraped(metrics):
    families = list(parser.text_string_to_metric_families(metrics.text().decode()))
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value for family in families for sample in family.samples
    }


@pytest.fixture
def metrics():
    return ServerMetrics(lambda: ["a", "b"], Gate(Limits()))


def test_the_names_are_those_of_dashboards(metrics):
    metrics.count("a", "ok", seconds=0.1, queued=0.0, model_seconds=0.05)
    assert {key[0] for key in scraped(metrics)} == NAMES


def test_what_was_counted(metrics):
    for seconds in (0.0004, 0.004, 40.0):
        metrics.count("a", "ok", seconds=seconds, queued=0.001, model_seconds=seconds / 4)
    metrics.count("a", "refused", seconds=1.0, queued=0.0, model_seconds=0.0)
    metrics.count("b", "timeout", seconds=2.0, queued=0.5, model_seconds=1.5)
    found, a, b = scraped(metrics), ("model", "a"), ("model", "b")
    assert found[("graphcache_requests_total", a, ("outcome", "ok"))] == 3
    assert found[("graphcache_requests_total", a, ("outcome", "refused"))] == 1
    assert found[("graphcache_requests_total", b, ("outcome", "timeout"))] == 1
    assert found[("graphcache_request_seconds_count", a)] == 4
    assert found[("graphcache_request_seconds_sum", a)] == pytest.approx(41.0044)
    buckets = {dict(key[1:])["le"]: value for key, value in found.items() if key[0].endswith("_bucket") and a in key}
    assert (buckets["0.0005"], buckets["0.005"], buckets["1.0"], buckets["10.0"], buckets["+Inf"]) == (1, 2, 3, 3, 4)
    assert found[("graphcache_queue_seconds_total", a)] == pytest.approx(0.003)
    assert found[("graphcache_model_seconds_count", a)] == 3
    assert found[("graphcache_model_share", a)] == pytest.approx(0.25)
    assert ("graphcache_model_share", b) not in found


def test_the_share_of_the_model_is_of_what_was_answered(metrics):
    assert metrics.model_share("a") is None
    metrics.count("a", "timeout", seconds=9.0, queued=0.0, model_seconds=9.0)
    assert metrics.model_share("a") is None
    metrics.count("a", "ok", seconds=4.0, queued=1.0, model_seconds=3.0)
    assert metrics.model_share("a") == 0.75


def test_the_same_in_the_words_of_triton(metrics):
    for _ in range(2):
        metrics.count("a", "ok", seconds=0.5, queued=0.125, model_seconds=0.25)
    metrics.count("a", "timeout", seconds=2.0, queued=1.0, model_seconds=0.5)
    found = metrics.statistics("a")
    assert (found["inference_count"], found["execution_count"], found["batch_stats"]) == (2, 2, [])
    assert {name: (each["count"], each["ns"]) for name, each in found["inference_stats"].items()} == {
        "success": (2, 10**9),
        "fail": (1, 2 * 10**9),
        "queue": (2, 250_000_000),
        "compute_input": (2, 0),
        "compute_infer": (2, 500_000_000),
        "compute_output": (2, 0),
    }
    assert metrics.statistics("b")["inference_stats"]["success"] == {"count": 0, "ns": 0}


def test_names_that_are_not_served_make_one_series_together(metrics):
    for index in range(50):
        metrics.count(f"model{index}", "refused", seconds=0.1, queued=0.0, model_seconds=0.0)
    found = scraped(metrics)
    assert found[("graphcache_requests_total", ("model", UNKNOWN), ("outcome", "refused"))] == 50
    assert {dict(key[1:]).get("model") for key in found} == {UNKNOWN, None}


def test_what_runs_and_waits_is_read_when_it_is_asked_for():
    gate = Gate(Limits())
    metrics = ServerMetrics(list, gate)
    with gate.admitted():
        assert scraped(metrics)[("graphcache_requests_waiting",)] == 1
    assert scraped(metrics)[("graphcache_requests_waiting",)] == 0


def test_every_status_has_an_outcome():
    assert {outcome_of(status) for status in range(200, 600)} == {"ok", "refused", "timeout", "unavailable", "failed"}


def test_without_the_package_the_extra_is_named(monkeypatch, metrics):
    monkeypatch.setitem(__import__("sys").modules, "prometheus_client", None)
    with pytest.raises(ExtraNotFoundError, match=r'/metrics needs prometheus_client .*"graphcache\[metrics\]"$'):
        metrics.text()
