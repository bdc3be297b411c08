"""What Prometheus sees, read by its own parser."""

import gc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import graphcache
from graphcache.errors import ConfigError, ExtraNotFoundError
from graphcache.observe import Collector
from tests.helpers import Fn

prometheus_client = pytest.importorskip("prometheus_client")
parser = pytest.importorskip("prometheus_client.parser")

NAMES = {
    "graphcache_replays_total",
    "graphcache_captures_total",
    "graphcache_evictions_total",
    "graphcache_eager_total",
    "graphcache_capture_seconds_count",
    "graphcache_capture_seconds_sum",
    "graphcache_graphs",
    "graphcache_bytes",
}
"""Dashboards and alerts name them: a name that changes here breaks them."""


def scraped(*modules, **named):
    registry = prometheus_client.CollectorRegistry()
    registry.register(Collector(*modules, **named))
    text = prometheus_client.generate_latest(registry).decode()
    families = list(parser.text_string_to_metric_families(text))
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value for family in families for sample in family.samples
    }


def used():
    fast = graphcache.wrap(Fn(lambda m, x: x[x > 0] if x.shape[0] > 4 else x + 1), max_graphs=2)
    for size in (1, 2, 3, 3, 3, 5, 5):
        fast(torch.zeros(size))
    return fast


def test_the_names_are_those_of_dashboards():
    assert {key[0] for key in scraped(used())} == NAMES


def test_the_values_are_those_of_the_account():
    fast = used()
    found, info, module = scraped(fast), fast.cache_info(), ("module", "Fn")
    assert found[("graphcache_replays_total", module)] == info.hits == 2
    assert found[("graphcache_captures_total", module)] == info.captures == 3
    assert found[("graphcache_evictions_total", module)] == info.evictions == 1
    assert found[("graphcache_eager_total", module, ("reason", "data_dependent"))] == 2
    assert found[("graphcache_capture_seconds_count", module)] == 3
    assert found[("graphcache_capture_seconds_sum", module)] == pytest.approx(info.capture_seconds)
    assert found[("graphcache_graphs", module)] == info.graphs == 2
    assert found[("graphcache_bytes", module)] == info.nbytes > 0


def test_labels_are_module_and_reason_however_many_shapes_there_are():
    fast = graphcache.wrap(nn.ReLU())
    few = len(scraped(fast))
    for size in range(1, 30):
        fast(torch.zeros(size))
    found = scraped(fast)
    assert len(found) == few
    assert {name for key in found for name, _ in key[1:]} == {"module"}


def test_values_are_read_at_the_scrape_and_counters_only_grow():
    fast = graphcache.wrap(nn.ReLU())
    registry = prometheus_client.CollectorRegistry()
    registry.register(Collector(fast))

    def replays():
        return registry.get_sample_value("graphcache_replays_total", {"module": "ReLU"})

    seen = [replays()]
    for _ in range(3):
        fast(torch.zeros(2))
        seen.append(replays())
    fast.clear()
    seen.append(replays())
    assert seen == [0, 0, 1, 2, 2]


def test_modules_of_one_name_need_others():
    one, other = graphcache.wrap(nn.ReLU()), graphcache.wrap(nn.ReLU())
    with pytest.raises(ConfigError, match=r"another module named 'ReLU' here; .*add\(module, name='ReLU_2'\)"):
        Collector(one, other)
    collector = Collector(one)
    collector.add(one)
    collector.add(other, name="second")
    assert {sample.labels["module"] for family in collector.collect() for sample in family.samples} == {
        "ReLU",
        "second",
    }


def test_a_module_that_is_gone_is_no_longer_told_of():
    fast, kept = graphcache.wrap(nn.ReLU()), graphcache.wrap(nn.ReLU())
    collector = Collector(kept, gone=fast)
    del fast
    gc.collect()
    assert {sample.labels["module"] for family in collector.collect() for sample in family.samples} == {"ReLU"}


def test_parts_are_counted_in():
    inner = nn.Linear(2, 2).requires_grad_(False)
    fast = graphcache.wrap(Fn(lambda m, x: m.inner(x)[x[:, 0] > 0], inner=inner), include=["inner"])
    with torch.no_grad():
        for _ in range(3):
            fast(torch.ones(3, 2))
    assert scraped(fast)[("graphcache_captures_total", ("module", "Fn"))] == 1


@given(st.text())
def test_any_name_is_a_label(name):
    fast = graphcache.wrap(nn.ReLU())
    collector = Collector()
    collector.add(fast, name=name)
    registry = prometheus_client.CollectorRegistry()
    registry.register(collector)
    assert prometheus_client.generate_latest(registry)
    assert registry.get_sample_value("graphcache_graphs", {"module": name or "ReLU"}) == 0


@pytest.mark.parametrize("what", [None, 3, nn.ReLU(), "module"])
def test_what_is_not_wrapped_is_refused(what):
    with pytest.raises(ConfigError, match="expected a wrapped module"):
        Collector(what)
    with pytest.raises(ConfigError, match="expected a wrapped module"):
        Collector().add(what, name="x")


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "prometheus_client.core", None)
    with pytest.raises(ExtraNotFoundError, match=r'needs prometheus_client .*pip install "graphcache\[metrics\]"$'):
        Collector()
