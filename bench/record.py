"""What every measurement is recorded with, how calls are timed, and where results go."""

from __future__ import annotations

import json
import os
import platform
import random
import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

RESULTS = Path(__file__).parent / "results"


@dataclass
class Samples:
    """Times of single calls, in nanoseconds.

    Args:
        total: Call and synchronise with its stream.
        cpu: The call alone, until it returns. The device is idle when it starts.
    """

    total: list[int] = field(default_factory=list)
    cpu: list[int] = field(default_factory=list)

    def summary(self) -> dict[str, dict[str, float]]:
        """Statistics of both, in microseconds."""
        return {"total_us": summarise(self.total), "cpu_us": summarise(self.cpu)}


def summarise(nanoseconds: Sequence[float]) -> dict[str, float]:
    """Percentiles of some times.

    Args:
        nanoseconds: At least one time.

    Returns:
        ``p50``, ``p90``, ``p99``, ``min`` and ``iqr`` (the distance between the quartiles, as a measure of spread) in
        microseconds, and the count ``n``.

    Raises:
        ValueError: For no times at all.
    """
    if not nanoseconds:
        raise ValueError("no times to summarise; measure at least one call")
    ordered = sorted(nanoseconds)

    def at(fraction: float) -> float:
        position = fraction * (len(ordered) - 1)
        below = int(position)
        above = min(below + 1, len(ordered) - 1)
        return (ordered[below] + (position - below) * (ordered[above] - ordered[below])) / 1000

    figures = {"p50": at(0.5), "p90": at(0.9), "p99": at(0.99), "min": at(0.0), "iqr": at(0.75) - at(0.25)}
    return {**{name: round(value, 3) for name, value in figures.items()}, "n": len(ordered)}


def interleave(
    systems: Mapping[str, Callable[[], object]], calls: int, warmup: int = 50, seed: int = 0
) -> dict[str, Samples]:
    """Time systems against each other, one call of each per round, in a new random order every round.

    Clocks, caches and neighbours change during a run; interleaved, they change for all systems alike.

    Args:
        systems: Name to a function that makes one call and may return before the device has finished. What it has to
            do before, untimed, is its attribute ``ready``, if it has one.
        calls: Rounds that count.
        warmup: Rounds before, which don't.
        seed: Of the order.

    Returns:
        The samples of each system, ``calls`` of each.
    """
    wait = synchroniser()
    order = list(systems.items())
    shuffle = random.Random(seed).shuffle
    samples = {name: Samples() for name in systems}
    wait()
    for round_ in range(warmup + calls):
        shuffle(order)
        for name, call in order:
            if (ready := getattr(call, "ready", None)) is not None:
                ready()
                wait()
            start = perf_counter_ns()
            call()
            returned = perf_counter_ns()
            wait()
            done = perf_counter_ns()
            if round_ >= warmup:
                samples[name].total.append(done - start)
                samples[name].cpu.append(returned - start)
    return samples


def bursts(systems: Mapping[str, Callable[[], object]], rounds: int, length: int = 20) -> dict[str, dict[str, float]]:
    """CPU time per call where calls follow one another without waiting for the device.

    A burst is short enough that the launch queue never fills, and the wait after it is not timed.

    Args:
        systems: As for :func:`interleave`.
        rounds: Bursts of each system.
        length: Calls in a burst.

    Returns:
        Per system, statistics of the mean time of a call in each burst, in microseconds.
    """
    wait = synchroniser()
    times: dict[str, list[float]] = {name: [] for name in systems}
    for _ in range(rounds):
        for name, call in systems.items():
            wait()
            start = perf_counter_ns()
            for _ in range(length):
                call()
            times[name].append((perf_counter_ns() - start) / length)
            wait()
    return {name: summarise(values) for name, values in times.items()}


def synchroniser() -> Callable[[], object]:
    """Waits for everything on the stream that is current now, at the least cost there is; does nothing on the host.

    ``torch.cuda.synchronize()`` costs several microseconds of its own, and waiting for the whole device more with every
    graph there is: 0.1 µs with 8 executables, 7 with 64 and 75 with 256 (``cuCtxSynchronize``, H200, driver 580). Added
    to both sides, that would make every ratio look better than it is.

    Raises:
        RuntimeError: From the returned function, if the driver reports an error.
    """
    if not torch.cuda.is_available():
        return _nothing
    from cuda.bindings import driver

    # Makes torch's context current on this thread, which stream 0 relies on, and leaves nothing on other streams.
    torch.cuda.synchronize()
    wait, success = driver.cuStreamSynchronize, driver.CUresult.CUDA_SUCCESS
    stream = driver.CUstream(torch.cuda.current_stream().cuda_stream)

    def synchronise() -> None:
        (code,) = wait(stream)
        if code != success:
            raise RuntimeError(f"cuStreamSynchronize failed with {code.name}")

    return synchronise


def stream_scope(default_stream: bool) -> AbstractContextManager[object]:
    """A block whose current stream is torch's default (legacy) stream, or one of its own."""
    if default_stream or not torch.cuda.is_available():
        return nullcontext()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    return torch.cuda.stream(side)


def relative_error(answer: torch.Tensor, reference: torch.Tensor) -> float:
    """Norm of the difference over norm of the reference, in fp64; infinite if anything is not finite or misshapen."""
    if answer.shape != reference.shape:
        return float("inf")
    left, right = answer.detach().cpu().double(), reference.detach().cpu().double()
    error = float((left - right).norm() / right.norm().clamp(min=1e-30))
    return error if error == error else float("inf")


def require_cuda(what: str) -> torch.device:
    """The device to run on.

    Raises:
        SystemExit: If there is none.
    """
    if not torch.cuda.is_available():
        raise SystemExit(f"{what} runs TensorRT engines, which needs a CUDA device; there is none here")
    return torch.device("cuda", torch.cuda.current_device())


def environment(seed: int) -> dict[str, Any]:
    """What a figure depends on: device, driver, versions, commit, seed and date."""
    facts: dict[str, Any] = {
        "date_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "seed": seed,
        "graphcache": _version("graphcache"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda_bindings": _version("cuda-bindings"),
        "tensorrt": _tensorrt(),
        "torchvision": _version("torchvision"),
        "transformers": _version("transformers"),
        "compiled_hits": _compiled(),
        "processor": _processor(),
    }
    if torch.cuda.is_available():
        facts["device"] = torch.cuda.get_device_name()
        facts["compute_capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
        facts["driver"] = _driver()
        facts["cuda"] = torch.version.cuda
    else:
        facts["device"] = "host"
    return facts


def commit() -> str:
    """The commit that is measured: ``GRAPHCACHE_COMMIT`` where there is no repository, else HEAD, marked if changed."""
    given = os.environ.get("GRAPHCACHE_COMMIT", "").strip()
    return given or _output("git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") or "unknown"


def write(name: str, payload: Mapping[str, Any], out_dir: Path | None = None) -> Path:
    """Write a result as JSON: all of it or nothing, so that a run which is killed keeps what it wrote before.

    Args:
        name: Of the benchmark; the file is ``NAME.json``.
        payload: What was measured; the environment belongs under ``"environment"``.
        out_dir: ``None`` is bench/results/.

    Returns:
        The file.
    """
    folder = RESULTS if out_dir is None else out_dir
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.json"
    new = file.with_suffix(".json.new")
    new.write_text(json.dumps(payload, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    new.replace(file)
    return file


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], width: int = 140) -> None:
    """Print a table, through rich if it is there; floats with no, one or three decimals: from 1000, from 10, below.

    Args:
        title: Above it.
        columns: Headings, of several lines if they have line ends in them.
        rows: One cell for each column. Columns with numbers in them are set to the right.
        width: What a log has room for; a terminal is as wide as it is.
    """
    texts = [[_cell(value) for value in row] for row in rows]
    right = [any(isinstance(row[index], int | float) for row in rows) for index in range(len(columns))]
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        heads = [head.split("\n") for head in columns]
        depth = max(map(len, heads), default=0)
        head_rows = [[head[line] if line < len(head) else "" for head in heads] for line in range(depth)]
        widths = [max(len(row[index]) for row in [*head_rows, *texts]) for index in range(len(columns))]
        print(title)
        for row in [*head_rows, *texts]:
            cells = [
                text.rjust(width_) if numbers else text.ljust(width_)
                for text, width_, numbers in zip(row, widths, right, strict=True)
            ]
            print("  ".join(cells).rstrip())
        return
    made = Table(title=title, title_justify="left")
    for column, numbers in zip(columns, right, strict=True):
        made.add_column(column, justify="right" if numbers else "left")
    for row in texts:
        made.add_row(*row)
    # A log is no terminal and has no width; 80 columns would fold every row.
    Console(width=None if sys.stdout.isatty() else width).print(made)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.{0 if abs(value) >= 1000 else 1 if abs(value) >= 10 else 3}f}"
    return str(value)


def _nothing() -> None:
    pass


def _version(distribution: str) -> str | None:
    if distribution == "graphcache":
        import graphcache

        return getattr(graphcache, "__version__", None)
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _compiled() -> bool | None:
    """Whether graphcache's hits go through its native code; None for a checkout from before it."""
    try:
        from graphcache import native
    except ImportError:
        return None
    return native.loaded(wait=True) is not None


def _tensorrt() -> str | None:
    # What this process has loaded, not what is installed: a machine may have two flavours.
    loaded = [name for name in ("tensorrt", "tensorrt_rtx", "tensorrt_lean") if name in sys.modules]
    return ", ".join(f"{name} {getattr(sys.modules[name], '__version__', '?')}" for name in loaded) or None


def _driver() -> str | None:
    said = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return said.splitlines()[0] if said else None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _output(*command: str) -> str:
    try:
        folder = Path(__file__).parent
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=folder, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
