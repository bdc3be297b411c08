"""A model, or several, as an application of Ray Serve."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from graphcache.errors import ConfigError, GraphCacheError, ServingError, shown
from graphcache.extras import optional
from graphcache.serving.auth import check_configured
from graphcache.serving.ingress import Forward, Ingress, Settled
from graphcache.serving.limits import Limits
from graphcache.serving.replica import replica_class
from graphcache.serving.settings import Settings, checked_wait
from graphcache.serving.transport import told

APPLICATION = "graphcache"
"""Of the application, where nobody named it."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How many processes serve on Ray, and what each of them has.

    Args:
        num_replicas: How many of each model.
        num_fronts: How many processes speak HTTP before them; each bounds how many requests pass in a second.
        num_gpus: For each replica; ``None`` is 1 where this process sees a GPU, else 0.
        num_cpus: For each replica, as Ray counts them.
        batch_wait_timeout_s: How long the first request of a batch waits for others, in seconds.
        max_queued_requests: Beyond these, requests are refused until there is room.
        graceful_shutdown_timeout_s: Seconds that a replica has to answer what it took.
        ray_actor_options: More of them for the replicas, such as ``{"runtime_env": {...}}``.

    Raises:
        ConfigError: Naming the option.
    """

    num_replicas: int = 1
    num_fronts: int = 1
    num_gpus: float | None = None
    num_cpus: float = 1
    batch_wait_timeout_s: float = 0.002
    max_queued_requests: int = 1024
    graceful_shutdown_timeout_s: float = 20.0
    ray_actor_options: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for option in ("num_replicas", "num_fronts"):
            value = getattr(self, option)
            if type(value) is not int or value < 1:
                raise ConfigError(f"{option}={shown(value)}: expected a whole number, 1 or more")
        checked_wait(self.batch_wait_timeout_s, "batch_wait_timeout_s")

    @property
    def actor_options(self) -> dict[str, Any]:
        """Of each replica."""
        gpus = (1 if torch.cuda.is_available() else 0) if self.num_gpus is None else self.num_gpus
        return {"num_cpus": self.num_cpus, "num_gpus": gpus, **(self.ray_actor_options or {})}


def deployment(
    model: Any, *, token: str | None = None, limits: Limits | None = None, asgi: Any = None, **options: Any
) -> Any:
    """An application for ``serve.run``, or for a Serve config file: replicas of a model, and the protocol before them.

    A replica loads the model and captures its graphs before it is healthy. Requests are put together up to sizes that
    have a graph, and go to a replica that holds the graphs of their kind. A request whose replica died is asked again.

    Args:
        model: An engine file, a package, or a function that makes a module, itself or as ``"package.module:function"``.
            Files are read where the replicas run. A mapping from names to such, or to ``Settings``, serves several.
        token: What clients must bring; see :func:`graphcache.serving.app.make_app`.
        limits: Of requests; ``None`` takes in as many at once as the replicas have use for.
        asgi: What makes the ASGI application of a backend; ``None`` is that of the Open Inference Protocol.
        **options: Fields of :class:`Scale`; and of :class:`~graphcache.serving.settings.Settings`, for models that do
            not come as ``Settings``.

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
    scaled = {each.name for each in fields(Scale)}
    scale = Scale(**{option: value for option, value in options.items() if option in scaled})
    served = _settings(model, {option: value for option, value in options.items() if option not in scaled})
    handles = {each.name: _replicas(serve, each, scale).bind(each) for each in served}
    actor: dict[str, Any] = {"num_cpus": 0}
    if "runtime_env" in scale.actor_options:
        actor["runtime_env"] = scale.actor_options["runtime_env"]
    front = serve.deployment(
        serve.ingress(Forward())(Ingress),
        name="ingress",
        num_replicas=scale.num_fronts,
        ray_actor_options=actor,
        max_ongoing_requests=4096,
        graceful_shutdown_timeout_s=scale.graceful_shutdown_timeout_s,
        graceful_shutdown_wait_loop_s=0.1,
    )
    # As many at once as fill every replica's next batch while one runs.
    at_once = 2 * scale.num_replicas * sum(each.max_batch_size for each in served)
    limits = limits or Limits(max_concurrency=max(Limits().max_concurrency, at_once))
    return front.bind(handles, Settled(token=token, limits=limits, asgi=asgi))


def _settings(model: Any, options: Mapping[str, Any]) -> list[Settings]:
    """The settings of each model that is served."""
    options = {option: value for option, value in options.items() if (option, value) != ("config", None)}
    models = model if isinstance(model, Mapping) else {options.pop("name", ""): model}
    known = {each.name for each in fields(Settings)} - {"source", "version"}
    for option in options:
        if option not in known:
            raise ConfigError(f"{shown(option)} is no option of deployment; expected fields of Scale or Settings")
    served = [
        source if isinstance(source, Settings) else Settings(source, **{**options, "name": name})
        for name, source in models.items()
    ]
    if not served:
        raise ConfigError(f"model={shown(model)}: expected at least one")
    return served


def _replicas(serve: Any, settings: Settings, scale: Scale) -> Any:
    """Ray's deployment of one model."""
    return serve.deployment(
        replica_class(settings, scale.batch_wait_timeout_s),
        name=settings.name,
        num_replicas=scale.num_replicas,
        ray_actor_options=scale.actor_options,
        # Enough for a batch that runs and those that form behind it.
        max_ongoing_requests=max(64, 4 * settings.max_batch_size),
        max_queued_requests=scale.max_queued_requests,
        graceful_shutdown_timeout_s=scale.graceful_shutdown_timeout_s,
        graceful_shutdown_wait_loop_s=0.1,
        health_check_period_s=2,
        # What a model is missing, it will be missing again.
        max_constructor_retry_count=1,
    )


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
