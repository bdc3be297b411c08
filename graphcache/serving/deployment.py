"""A model, or several, as an application of Ray Serve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from graphcache.errors import ConfigError, GraphCacheError, ServingError, shown
from graphcache.extras import optional
from graphcache.serving.auth import check_configured
from graphcache.serving.ingress import Forward, Ingress, Settled
from graphcache.serving.limits import Limits
from graphcache.serving.replica import replica_class
from graphcache.serving.settings import MOST_KINDS, MOST_ROWS, Settings, checked_wait
from graphcache.serving.transport import told

APPLICATION = "graphcache"
"""Of the application, where nobody named it."""


def deployment(
    model: Any,
    *,
    name: str = "",
    into: Any = None,
    device: str | None = None,
    config: Mapping[str, Any] | None = None,
    buckets: Any = None,
    rows: Any = None,
    prepare: Sequence[Mapping[str, Any]] = (),
    max_batch_size: int = MOST_ROWS,
    batch_wait_timeout_s: float = 0.002,
    max_kinds: int = MOST_KINDS,
    num_replicas: int = 1,
    num_fronts: int = 1,
    num_gpus: float | None = None,
    num_cpus: float = 1,
    max_queued_requests: int = 1024,
    graceful_shutdown_timeout_s: float = 20.0,
    ray_actor_options: Mapping[str, Any] | None = None,
    token: str | None = None,
    limits: Limits | None = None,
    asgi: Any = None,
) -> Any:
    """An application for ``serve.run``, or for a Serve config file: replicas of a model, and the protocol before them.

    A replica loads the model and captures its graphs before it is healthy. Requests are put together up to sizes that
    have a graph, and go to a replica that holds the graphs of their kind. A request whose replica died is asked again.

    Args:
        model: An engine file, a package, or a function that makes a module, itself or as ``"package.module:function"``.
            Files are read where the replicas run. A mapping from names to such, or to ``Settings``, serves several.
        name: Under which it is served; the file's or the function's if empty.
        into: For a package of a model: what makes the model.
        device: Where a module that a function makes goes; ``None`` leaves it there.
        config: Options of :class:`graphcache.GraphConfig`, but ``buckets``; ``capture`` is ``"prepared"`` if not given.
        buckets: Sizes of the rows, such as ``[1, 8, 32]``; or sizes by input and axis, as the ``buckets`` option has
            them. Where they do not name axis 0, it has the sizes of ``rows``.
        rows: Sizes of the rows, where ``buckets`` do not give them; ``None`` means powers of two.
        prepare: Requests whose sizes of the rows are captured at the start; needed for a module, which does not say
            what it takes.
        max_batch_size: Rows that are put together at most.
        batch_wait_timeout_s: How long the first request of a batch waits for others, in seconds.
        max_kinds: Kinds of requests (sizes but for the rows) whose graphs one replica keeps.
        num_replicas: How many of them.
        num_fronts: How many processes speak HTTP before them; each bounds how many requests pass in a second.
        num_gpus: For each replica; ``None`` is 1 where this process sees a GPU, else 0.
        num_cpus: For each replica, as Ray counts them.
        max_queued_requests: Beyond these, requests are refused until there is room.
        graceful_shutdown_timeout_s: Seconds that a replica has to answer what it took.
        ray_actor_options: More of them for the replicas, such as ``{"runtime_env": {...}}``.
        token: What clients must bring; see :func:`graphcache.serving.app.make_app`.
        limits: Of requests; ``None`` takes in as many at once as the replicas have use for.
        asgi: What makes the ASGI application of a backend; ``None`` is that of the Open Inference Protocol.

    Raises:
        ConfigError: Naming the option.
        ExtraNotFoundError: If Ray is not installed.

    Example::

        from ray import serve
        from graphcache.serving.deployment import deployment

        serve.run(deployment("policy.engine", buckets=[1, 8, 32], num_replicas=4), route_prefix="/")
    """
    serve = optional("ray.serve", "serving on Ray")
    check_configured(token)
    for option, value in (("num_replicas", num_replicas), ("num_fronts", num_fronts)):
        if type(value) is not int or value < 1:
            raise ConfigError(f"{option}={shown(value)}: expected a whole number, 1 or more")
    wait = checked_wait(batch_wait_timeout_s, "batch_wait_timeout_s")

    def settings(source: Any, name: str) -> Settings:
        if isinstance(source, Settings):
            return source
        return Settings(
            source,
            name=name,
            into=into,
            device=device,
            buckets=buckets,
            rows=rows,
            prepare=tuple(prepare),
            config=dict(config or {}),
            max_batch_size=max_batch_size,
            max_kinds=max_kinds,
        )

    models = model if isinstance(model, Mapping) else {name: model}
    served = [settings(source, key) for key, source in models.items()]
    if not served:
        raise ConfigError(f"model={shown(model)}: expected at least one")
    gpus = (1 if torch.cuda.is_available() else 0) if num_gpus is None else num_gpus
    options = {"num_cpus": num_cpus, "num_gpus": gpus, **(ray_actor_options or {})}
    handles = {}
    for each in served:
        replicas = serve.deployment(
            replica_class(each, wait),
            name=each.name,
            num_replicas=num_replicas,
            ray_actor_options=options,
            # Enough for a batch that runs and those that form behind it.
            max_ongoing_requests=max(64, 4 * each.max_batch_size),
            max_queued_requests=max_queued_requests,
            graceful_shutdown_timeout_s=graceful_shutdown_timeout_s,
            graceful_shutdown_wait_loop_s=0.1,
            health_check_period_s=2,
            # What a model is missing, it will be missing again.
            max_constructor_retry_count=1,
        )
        handles[each.name] = replicas.bind(each)
    front = serve.deployment(
        serve.ingress(Forward())(Ingress),
        name="ingress",
        num_replicas=num_fronts,
        ray_actor_options={
            "num_cpus": 0,
            **({"runtime_env": options["runtime_env"]} if "runtime_env" in options else {}),
        },
        max_ongoing_requests=4096,
        graceful_shutdown_timeout_s=graceful_shutdown_timeout_s,
        graceful_shutdown_wait_loop_s=0.1,
    )
    # As many at once as fill every replica's next batch while one runs.
    at_once = 2 * num_replicas * sum(each.max_batch_size for each in served)
    limits = limits or Limits(max_concurrency=max(Limits().max_concurrency, at_once))
    return front.bind(handles, Settled(token=token, limits=limits, asgi=asgi))


def reload(name: str, source: Any = None, *, application: str = APPLICATION, timeout_s: float = 600.0) -> list[int]:
    """Load a model anew in every replica of a running application, without a request lost.

    Each replica prepares the new one beside the old one and then changes over. Replicas that are started later read the
    place that the application was deployed with, so replace the file there, or deploy again.

    Args:
        name: Of the model.
        source: Where from; the place it came from, if ``None``.
        application: Of Ray Serve.
        timeout_s: Seconds to wait for all of them.

    Returns:
        The version that each replica answers with.

    Raises:
        GraphCacheError: What was wrong with the new one; the replica that says so goes on with the old one.
        ServingError: If there is no such application.
    """
    found: list[int] = _asked(application, timeout_s, name, "reload", source)
    return found


def stats(name: str, *, application: str = APPLICATION, timeout_s: float = 60.0) -> list[dict[str, Any]]:
    """Counters of every replica of a model.

    Raises:
        ServingError: If there is no such application or model.
    """
    found: list[dict[str, Any]] = _asked(application, timeout_s, name, "stats")
    return found


def front(application: str) -> Any:
    """The handle of a running application's front.

    Raises:
        ServingError: If there is no such application.
    """
    try:
        return optional("ray.serve", "serving on Ray").get_app_handle(application)
    except GraphCacheError:
        raise
    except Exception as error:
        raise ServingError(f"Ray Serve runs no application {application!r} here ({error}); deploy it first") from error


def _asked(application: str, timeout_s: float, *args: Any) -> Any:
    handle = front(application)
    try:
        return handle.admin.remote(*args).result(timeout_s=timeout_s)
    except Exception as error:
        raise told(error) from error
