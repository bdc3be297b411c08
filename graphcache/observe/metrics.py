"""The counters of wrapped modules for Prometheus, read when they are scraped: a call costs nothing more.

``prometheus_client`` is imported when a collector is made. Metrics are labelled by module and reason, never by shape:
a label for each shape would be a time series for each shape.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any
from weakref import WeakValueDictionary

from graphcache.errors import ConfigError, shown
from graphcache.extras import optional
from graphcache.modules.cached import CachedModule
from graphcache.modules.controls import controls
from graphcache.modules.info import CacheInfo
from graphcache.observe.counters import checked


class Collector:
    """A collector of ``prometheus_client``, which the caller registers.

    It holds no module: one that nobody else keeps is no longer told of.

    Args:
        modules: Wrapped modules, told under their own names.
        named: Wrapped modules under other names.

    Raises:
        ExtraNotFoundError: If ``prometheus_client`` is not installed.
        ConfigError: For what is not wrapped, or two modules of one name.

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
        self._families = optional("prometheus_client.core", "a collector for Prometheus")
        self._modules: WeakValueDictionary[str, CachedModule] = WeakValueDictionary()
        self._lock = threading.Lock()
        for module in modules:
            self.add(module)
        for name, each in named.items():
            self.add(each, name=name)

    def add(self, module: CachedModule, *, name: str = "") -> None:
        """Tell of one more module from now on.

        Args:
            module: A wrapped module.
            name: The label it gets; its own name if empty.

        Raises:
            ConfigError: For what is not wrapped, or a name that another module has here.
        """
        label = name or checked(module).ledger.name
        if not isinstance(label, str):
            raise ConfigError(f"name={shown(name)}: expected text")
        with self._lock:
            if self._modules.get(label, module) is not checked(module):
                raise ConfigError(
                    f"there is another module named {label!r} here; give one of them another name, such as "
                    f"add(module, name='{label}_2')"
                )
            self._modules[label] = module

    def describe(self) -> list[Any]:
        """The metrics without their values, so that registering reads nothing."""
        return list(self._made({}))

    def collect(self) -> Iterator[Any]:
        """The metrics as they are now."""
        with self._lock:
            modules = dict(self._modules)
        return self._made({label: controls(module).cache_info() for label, module in modules.items()})

    def _made(self, infos: dict[str, CacheInfo]) -> Iterator[Any]:
        core = self._families
        counters = {
            "graphcache_replays": ("Calls answered by a graph.", "hits"),
            "graphcache_captures": ("Graphs captured.", "captures"),
            "graphcache_evictions": ("Graphs closed, whatever the cause.", "evictions"),
        }
        for name, (text, field) in counters.items():
            family = core.CounterMetricFamily(name, text, labels=["module"])
            for label, info in infos.items():
                family.add_metric([label], getattr(info, field))
            yield family
        eager = core.CounterMetricFamily("graphcache_eager", "Calls answered without a graph.", labels=_BY_REASON)
        for label, info in infos.items():
            for reason, count in info.eager.items():
                eager.add_metric([label, reason.value], count)
        yield eager
        seconds = core.SummaryMetricFamily("graphcache_capture_seconds", "Time spent capturing.", labels=["module"])
        for label, info in infos.items():
            seconds.add_metric([label], count_value=info.captures, sum_value=info.capture_seconds)
        yield seconds
        gauges = {
            "graphcache_graphs": ("Graphs held.", "graphs"),
            "graphcache_bytes": ("Memory that the graphs own, on a device partly an estimate.", "nbytes"),
        }
        for name, (text, field) in gauges.items():
            family = core.GaugeMetricFamily(name, text, labels=["module"])
            for label, info in infos.items():
                family.add_metric([label], getattr(info, field))
            yield family


_BY_REASON = ["module", "reason"]
