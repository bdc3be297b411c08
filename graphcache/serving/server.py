"""Ray on this machine alone, for as long as a server runs in it."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from graphcache.errors import ServingError
from graphcache.events import log
from graphcache.extras import optional
from graphcache.serving.deployment import APPLICATION, front
from graphcache.serving.transport import told

OBJECT_STORE = 128 * 2**20
"""Bytes for what is on its way between processes; Ray would take a third of the memory."""
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray's own ports listen on the loopback alone where it takes this machine for the whole cluster. (It asks for this
    # under a name that speaks of other systems; services.get_node_ip_address is where it is read.)
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
}
_imported_with: dict[str, str] = {}
_QUIET = {"log_level": "ERROR", "enable_access_log": False}


@contextmanager
def ray_here(
    *, host: str = "127.0.0.1", port: int = 8000, num_cpus: int | None = None, env: Mapping[str, str] | None = None
) -> Iterator[None]:
    """Ray and Serve on this machine, until the block ends. Nothing of it is left then, neither processes nor files.

    Usage statistics are off, and so is the dashboard. Ray's own ports are on the loopback, or want a secret of this
    process; where Ray was imported before, neither can be had, which is logged.
    """
    _check_free(host, port)
    with ExitStack() as stack:
        for name, value in {**_ENVIRONMENT, **_secret()}.items():
            stack.callback(_restore, name, os.environ.get(name))
            os.environ[name] = value
        ray, serve = optional("ray", "serving on Ray"), optional("ray.serve", "serving on Ray")
        if ray.is_initialized():
            raise ServingError("Ray runs in this process already; deploy to it with graphcache.serving.deployment")
        # Under /tmp wherever TMPDIR is: the path of a socket has at most 107 characters, and Ray needs 70 of them.
        folder = tempfile.mkdtemp(prefix="graphcache-ray-", dir="/tmp" if os.path.isdir("/tmp") else None)
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        stack.callback(ray.shutdown)
        ray.init(
            num_cpus=num_cpus,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE,
            log_to_driver=False,
            logging_level="ERROR",
            _node_ip_address="127.0.0.1",
            _temp_dir=folder,
            runtime_env={"env_vars": {**_ENVIRONMENT, **(env or {})}},
        )
        stack.callback(serve.shutdown)
        for name in ("ray", "ray.serve"):
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port}, logging_config=_QUIET)
        yield


@dataclass(frozen=True)
class Ready:
    """An application that answers.

    Args:
        name: Of the application.
        models: What it serves, as :class:`~graphcache.serving.backend.ModelSpec`.
        seconds: From the start of the deployment to here.
    """

    name: str
    models: tuple[Any, ...]
    seconds: float


def run(application: Any, *, name: str = APPLICATION, route_prefix: str = "/") -> Ready:
    """Deploy an application, and wait until all replicas have captured their graphs."""
    serve = optional("ray.serve", "serving on Ray")
    start = time.monotonic()
    try:
        handle = serve.run(application, name=name, route_prefix=route_prefix, logging_config=_QUIET)
    except RuntimeError as error:
        raise ServingError(_failure(serve, name) or str(error)) from error
    models = tuple(handle.specs.remote().result(timeout_s=60))
    return Ready(name, models, time.monotonic() - start)


def drain(name: str = APPLICATION, *, timeout_s: float = 20.0) -> int:
    """Refuse new requests of an application, answer those that are under way, and take it down."""
    serve = optional("ray.serve", "serving on Ray")
    handle = front(name)
    try:
        left: int = sum(handle.broadcast("drain", timeout_s).results(timeout_s=timeout_s + 10))
    except Exception as error:
        raise told(error) from error
    # Its replicas end after what they are sending, and the proxy after what it passes on.
    serve.delete(name)
    return left


def _failure(serve: Any, name: str) -> str:
    """What a constructor raised, from the traceback that Serve reports."""
    found = serve.status().applications.get(name)
    for each in found.deployments.values() if found is not None else ():
        lines = [line.strip() for line in str(each.message).splitlines() if line.strip()]
        raised = [line for line in lines if line.partition(":")[0].rpartition(".")[2].endswith(("Error", "Exception"))]
        if raised:
            return raised[-1].removeprefix("graphcache.errors.")
    return ""


def _secret() -> dict[str, str]:
    """What Ray's processes prove to each other that they belong together: replicas listen on all addresses.

    Ray reads it when it is imported, so there is one for a process, and none where somebody else imported Ray before.
    """
    if "ray" not in sys.modules:
        _imported_with.update({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)})
    elif not _imported_with:
        log.warning(
            "Ray was imported before it was started here, so its own ports listen on all addresses and take whoever "
            "comes; start it in a process that has not imported it, as graphcache serve does"
        )
    return _imported_with


def _check_free(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As servers do: what lingers of an earlier one does not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ServingError(f"{host}:{port} cannot be served ({error.strerror}); choose another port") from error


def _restore(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value
