"""``graphcache serve``: a model behind the Open Inference Protocol, on Ray Serve."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

from graphcache.buckets.spec import Axis
from graphcache.cli.options import ShapesCommand, ShapesType, Specs, device_option, json_option, points
from graphcache.cli.output import progress
from graphcache.cli.shapes import Spec
from graphcache.engines.library import require_gpu
from graphcache.serving.auth import check_configured
from graphcache.serving.deployment import deployment
from graphcache.serving.factories import is_factory
from graphcache.serving.server import Ready, drain, ray_here, run
from graphcache.serving.settings import Settings, from_folder


class BucketType(click.ParamType):  # type: ignore[type-arg]  # not generic before click 8.3
    """The type of ``--bucket``: ``1,8,32``, or ``ids:1,mask:1=16,64``, with ``:FILL`` at the end where there is one."""

    name = "sizes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        places, equals, sizes = value.rpartition("=")
        sizes, colon, fill = sizes.partition(":")
        try:
            found = "powers_of_two" if sizes == "powers_of_two" else [int(size) for size in sizes.split(",")]
            axes = []
            for place in places.split(",") if equals else ():
                name, _, axis = place.rpartition(":")
                if not name:
                    raise ValueError(place)
                axes.append((name, int(axis)))
            return tuple(axes), found, float(fill) if colon else None
        except ValueError:
            self.fail(
                f"{value!r} are no sizes; expected such as 1,8,32 or ids:1,mask:1=16,64 or x:1=8,16:0", param, ctx
            )


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """What the command was given."""

    target: str | None
    module: str | None
    name: str
    host: str
    port: int
    replicas: int
    max_batch_size: int
    batch_wait: float
    buckets: Sequence[Any]
    prepare: Sequence[Specs]
    token: str | None
    drain_s: float
    device: str | None
    as_json: bool


@click.command(cls=ShapesCommand, short_help="Serve a model over HTTP.")
@click.argument("target", metavar="[ENGINE|PACKAGE|FOLDER|MODULE:FACTORY]", required=False)
@click.option(
    "--module",
    metavar="MODULE:FACTORY",
    help="What makes the module that is served; beside a package of a model, the model that it is loaded into.",
)
@click.option("--name", default="", help="What the model is called; as the file or the function if left out.")
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True, help="The port to listen on.")
@click.option(
    "--replicas", type=click.IntRange(min=1), default=1, show_default=True, help="How many; one GPU for each."
)
@click.option(
    "--max-batch-size",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
    help="Rows that are put together at most.",
)
@click.option(
    "--batch-wait",
    type=click.FloatRange(0, 10),
    metavar="SECONDS",
    default=0.002,
    show_default=True,
    help="How long the first request of a batch waits for others.",
)
@click.option(
    "--bucket",
    "buckets",
    type=BucketType(),
    multiple=True,
    metavar="SIZES",
    help="Sizes to capture: of the rows, 1,8,32; of other axes, ids:1,mask:1=16,64, with :0 at the end if zeros in the "
    "margin are what the model needs. Powers of two for the rows if left out.",
)
@click.option(
    "--prepare",
    type=ShapesType(),
    multiple=True,
    help="A request to capture before serving, as --shapes of run; its rows do not matter. Needed for a module.",
)
@click.option("--token", envvar="GRAPHCACHE_SERVE_TOKEN", help="What clients must send; or GRAPHCACHE_SERVE_TOKEN.")
@click.option(
    "--drain",
    "drain_s",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    default=20.0,
    show_default=True,
    help="How long requests that are under way have at the end.",
)
@device_option
@json_option
def serve(**options: Any) -> None:
    """Serve an engine, a package or a module over HTTP, in the Open Inference Protocol (KServe, Triton's clients).

    A folder holds several models: FOLDER/NAME/VERSION/model.engine or .gcache, with FOLDER/NAME/config.json for their
    options, buckets and what to prepare. The newest version of each is served.

    Ray runs in here, for this machine alone. Graphs are captured before the first request; a line on stdout says when.
    SIGINT and SIGTERM end it once what is under way is answered. Needs the extra ray.

    \b
    Examples:
      graphcache serve model.engine --bucket 1,8,32 --replicas 4
      graphcache serve nets.py:mlp --prepare input:1x16
      graphcache serve --module package.nets:mlp --prepare input:1x16
    """
    given = ServeOptions(**options)
    target, models = _models(given)
    check_configured(given.token)
    left = _serve(given, target, models)
    if left:
        raise click.ClickException(f"{left} requests had no answer after {given.drain_s:g} s")


def _models(given: ServeOptions) -> tuple[str, dict[str, Settings]]:
    """What is served, and the settings of each model."""
    target, module = given.target, given.module
    if target is None:
        if module is None:
            raise click.UsageError("Missing what to serve: an engine, a package, a folder, or --module MODULE:FACTORY.")
        if not is_factory(module):
            raise click.UsageError(f"--module: {module!r} is no factory; such as package.module:function.")
        target, module = module, None
    if not is_factory(target):
        if not Path(target).exists():
            raise click.ClickException(
                f"there is no file {target}; expected an engine, a package, a folder of them, or a factory as "
                f"package.module:function or file.py:function"
            )
        require_gpu(f"serving {target}")
    if not is_factory(target) and Path(target).is_dir():
        if given.name or module or given.buckets or given.prepare:
            raise click.UsageError("A folder has --name, --module, --bucket and --prepare in its config.json files.")
        return target, from_folder(target, {"max_batch_size": given.max_batch_size})
    settings = Settings(
        _absolute(target),
        name=given.name,
        into=None if module is None else _absolute(module),
        buckets=_axes(given.buckets),
        rows=next((sizes for axes, sizes, _ in given.buckets if not axes), None),
        prepare=tuple(_request(point) for point in points(given.prepare)),
        max_batch_size=given.max_batch_size,
        device=given.device,
    )
    return target, {settings.name: settings}


def _serve(given: ServeOptions, target: str, models: dict[str, Settings]) -> int:
    """Serve until a signal comes; how many requests had no answer in the end."""
    processes = given.replicas * len(models)
    cpus = max(1, (os.cpu_count() or 1) // processes)
    with (
        _Stop() as stop,
        _quiet(),
        progress(f"Starting Ray for {target}") as show,
        ray_here(host=given.host, port=given.port, num_cpus=cpus * processes + 1),
    ):
        stop.listen()
        show(f"Preparing {target}")
        # Only now, since Ray reads its variables when it is imported.
        application = deployment(
            models,
            batch_wait_timeout_s=given.batch_wait,
            num_replicas=given.replicas,
            num_cpus=cpus,
            num_gpus=_gpus(processes),
            token=given.token,
        )
        ready = run(application)
        show("")
        host = f"[{given.host}]" if ":" in given.host else given.host
        _tell(f"http://{host}:{given.port}", ready, given.as_json)
        stop.wait()
        show("Answering what is under way")
        return drain(timeout_s=given.drain_s)


def _gpus(processes: int) -> float:
    """For each: one, or the share of one where there are fewer; Ray would wait for more of them without end."""
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return 1 / math.ceil(processes / devices) if devices else 0


def _absolute(target: str) -> str:
    """Where a replica finds it, whatever its folder."""
    if not is_factory(target):
        return str(Path(target).resolve())
    source, _, attribute = target.rpartition(":")
    return f"{Path(source).resolve()}:{attribute}" if source.endswith(".py") else target


def _axes(buckets: Sequence[Any]) -> dict[str, dict[int, Axis]] | None:
    found: dict[str, dict[int, Axis]] = {}
    for axes, sizes, fill in buckets:
        shared = Axis(sizes, fill=fill)
        for name, axis in axes:
            if axis in found.setdefault(name, {}):
                raise click.UsageError(f"--bucket names axis {axis} of {name!r} twice.")
            found[name][axis] = shared
    if sum(not axes for axes, _, _ in buckets) > 1:
        raise click.UsageError("--bucket gives the sizes of the rows twice.")
    return found or None


def _request(point: dict[str, Spec]) -> dict[str, Any]:
    """A shape where nothing is said of the dtype, which is the engine's own or float32; else a tensor."""
    found: dict[str, Any] = {}
    for name, spec in point.items():
        [shape] = spec.shapes
        if not shape:
            raise click.UsageError(f"--prepare: {name!r} has no dimensions, and so no rows.")
        if spec.dtype is None:
            found[name] = shape
            continue
        dtype = getattr(torch, spec.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise click.UsageError(f"--prepare: {name!r} has the dtype {spec.dtype!r}, which torch lacks.")
        found[name] = torch.zeros((1, *shape[1:]), dtype=dtype)
    return found


def _tell(url: str, ready: Ready, as_json: bool) -> None:
    """One line, past what keeps Ray quiet, as soon as it is true."""
    if as_json:
        told = [
            {
                "name": spec.name,
                "inputs": {each.name: [each.dtype, list(each.shape)] for each in spec.inputs},
                "outputs": {each.name: [each.dtype, list(each.shape)] for each in spec.outputs},
            }
            for spec in ready.models
        ]
        line = json.dumps({"url": url, "seconds": round(ready.seconds, 3), "models": told})
    else:
        models = [f"{spec.name} ({_tensors(spec.inputs)} -> {_tensors(spec.outputs)})" for spec in ready.models]
        line = f"{url} serves {'; '.join(map(str, models))}; ready after {ready.seconds:.1f} s"
    click.echo(line, file=sys.__stdout__)


def _tensors(specs: Sequence[Any]) -> str:
    sizes = {each.name: "x".join("*" if size < 0 else str(size) for size in each.shape) for each in specs}
    return ",".join(f"{name}:{size}" for name, size in sizes.items())


class _Stop:
    """Hears SIGINT and SIGTERM: before the server is ready they end it, afterwards they ask it to end."""

    def __init__(self) -> None:
        self._asked = threading.Event()
        self._ready = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _Stop:
        self.listen()
        return self

    def __exit__(self, *exc: object) -> None:
        for name, handler in self._before.items():
            signal.signal(name, handler)

    def listen(self) -> None:
        """Again after Ray has started, whose own handler of SIGTERM ends the process with a trace."""
        if threading.current_thread() is threading.main_thread():
            for name in (signal.SIGINT, signal.SIGTERM):
                before = signal.signal(name, self._hear)
                self._before.setdefault(name, before)

    def wait(self) -> None:
        """Until one of them comes."""
        self._ready = True
        self._asked.wait()

    def _hear(self, *_: object) -> None:
        if not self._ready:
            raise KeyboardInterrupt
        self._asked.set()


@contextmanager
def _quiet() -> Iterator[None]:
    """What Ray's driver prints of its own is no result."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield
