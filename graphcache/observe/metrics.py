"""The counters of wrapped modules for Prometheus. They are read when they are scraped, so that a call costs no more.

Metrics are labelled by module and reason, never by shape: every shape would be a time series of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any
from weakref import WeakValueDictionary

from graphcache.errors import ConfigError, shown
from graphcache.extras import optional
from graphcache.modules.cached_module import CachedModule
from graphcache.modules.transparent import controls
from graphcache.modules.wrapped import CacheInfo

_METRICS = (
    ("Counter", "graphcache_replays", "Calls answered by a graph.", "hits"),
    ("Counter", "graphcache_captures", "Graphs captured.", "captures"),
    ("Counter", "graphcache_evictions", "Graphs closed, whatever the cause.", "evictions"),
    ("Gauge", "graphcache_graphs", "Graphs held.", "graphs"),
    ("Gauge", "graphcache_bytes", "Memory that the graphs own, on a device partly an estimate.", "nbytes"),
)
"""Type, name and description of each metric, and the field of ``cache_info()`` that it shows."""


class Collector:
    """A collector of ``prometheus_client``, which the caller registers.

    It holds its modules weakly: the metrics of a module end with the module.

    Args:
        modules: Wrapped modules, labelled with their own names.
        named: Wrapped modules with other labels.

    Raises:
        ExtraNotFoundError: If ``prometheus_client`` is not installed.
        ConfigError: If a module is not wrapped, or two modules have one name.

    Example:
        >>> import torch, graphcache, prometheus_client
        >>> registry = prometheus_client.CollectorRegistry()
        >>> fast = graphcache.wrap(torch.nn.ReLU())
        >>> registry.register(Collector(policy=fast))
        >>> _ = fast(torch.zeros(2)), fast(torch.zeros(2))
        >>> registry.get_sample_value("graphcache_replays_total", {"module": "policy"})
        1
    """

    def __init__(self, *modules: CachedModule, **named: CachedModule) -> None:
        self._client = optional("prometheus_client.core", "a collector for Prometheus")
        self._modules: WeakValueDictionary[str, CachedModule] = WeakValueDictionary()
        self._lock = threading.Lock()
        for name, module in (*(("", each) for each in modules), *named.items()):
            self.add(module, name=name)

    def add(self, module: CachedModule, *, name: str = "") -> None:
        """Collect the metrics of one more module.

        Args:
            module: A wrapped module.
            name: Its label; its own name if empty.

        Raises:
            ConfigError: If the module is not wrapped, or another module has this label.
        """
        own = controls(module).ledger.name
        label = name or own
        if not isinstance(label, str):
            raise ConfigError(f"name={shown(name)}: expected text")
        with self._lock:
            if self._modules.get(label, module) is not module:
                raise ConfigError(
                    f"there is another module named {label!r} here; give one of them another name, such as "
                    f"add(module, name='{label}_2')"
                )
            self._modules[label] = module

    def describe(self) -> list[Any]:
        """The metrics without values: registering reads nothing."""
        return list(self._families({}))

    def collect(self) -> Iterator[Any]:
        """The metrics with the values of now."""
        with self._lock:
            modules = dict(self._modules)
        return self._families({label: controls(module).cache_info() for label, module in modules.items()})

    def _families(self, infos: dict[str, CacheInfo]) -> Iterator[Any]:
        """Each metric with its samples."""
        for kind, name, text, field in _METRICS:
            family = getattr(self._client, f"{kind}MetricFamily")(name, text, labels=["module"])
            for label, info in infos.items():
                family.add_metric([label], getattr(info, field))
            yield family
        eager = self._client.CounterMetricFamily(
            "graphcache_eager", "Calls answered without a graph.", labels=["module", "reason"]
        )
        seconds = self._client.SummaryMetricFamily(
            "graphcache_capture_seconds", "Time spent capturing.", labels=["module"]
        )
        for label, info in infos.items():
            for reason, count in info.eager.items():
                eager.add_metric([label, reason.value], count)
            seconds.add_metric([label], count_value=info.captures, sum_value=info.capture_seconds)
        yield from (eager, seconds)
