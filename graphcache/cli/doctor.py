"""``graphcache doctor``: what is installed, whether it fits together, and whether evicted graphs harm the others."""

from __future__ import annotations

import importlib
import importlib.util
import platform
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import click
import torch
from rich.text import Text

import graphcache
from graphcache import Reason, native
from graphcache.cli.canary import canary
from graphcache.cli.examine import examine
from graphcache.cli.machine import driver_version
from graphcache.cli.options import ShapesCommand, Specs, device_option, json_option, shapes_option
from graphcache.cli.output import ComparisonFailed, one_line, print_json, progress, stdout, table
from graphcache.engines.library import Flavour, library, require_gpu
from graphcache.errors import CudaError, GraphCacheError, NoGpuError, TensorRTNotFoundError
from graphcache.extras import EXTRAS as EXTRAS
from graphcache.graphs import driver
from graphcache.serving.factories import raised

Verdict = Literal["ok", "warning", "failed", "not here"]

_STYLES: dict[Verdict, str] = {"ok": "green", "warning": "yellow", "failed": "bold red", "not here": "dim"}


@dataclass(frozen=True)
class Finding:
    """What a check gave.

    Args:
        verdict: ``"not here"`` is the lack of something that graphcache can do without.
        seen: What was seen.
        remedy: What to do; empty if nothing.
        differences: How many answers of graphs were wrong.
    """

    verdict: Verdict
    seen: str
    remedy: str = ""
    differences: int = 0


@click.command(cls=ShapesCommand, short_help="Check the installation, or find what forbids graphs in a module.")
@click.argument("target", required=False, metavar="[MODULE:FACTORY]")
@shapes_option(
    "Shapes of one call of the module, as for run.",
)
@device_option
@json_option
def doctor(target: str | None, shapes: Sequence[Specs], device: str | None, as_json: bool) -> None:
    """Check what is installed, and whether graphs still answer right when others are evicted beside them.

    With a module, find every operation in it that forbids a graph, with its line, by one eager call; a laptop without a
    GPU will do.

    Exits with 1 if a check failed, and with 3 if an answer of a graph was wrong or something forbids a graph. What is
    not here and what calls for caution fail nothing.

    \b
    Examples:
      graphcache doctor
      graphcache doctor nets.py:mlp --shapes input:8x16
    """
    if target is not None:
        examine(target, shapes, device, as_json=as_json)
        return
    if shapes or device:
        raise click.UsageError("--shapes and --device are for a module; name it as package.module:function.")
    checks: dict[str, Callable[[], Finding]] = {
        "versions": check_versions,
        "CUDA devices": check_devices,
        "cuda-python": check_cuda_python,
        "native code": check_native_code,
        "TensorRT": check_tensorrt,
        **{f"extra {name}": partial(check_extra, name) for name in EXTRAS},
        "canary": check_canary,
    }
    found = {}
    with progress("Checking") as show:
        for name, check in checks.items():
            show(f"Checking: {name}")
            found[name] = _guarded(check)
    failed = [name for name, finding in found.items() if finding.verdict == "failed"]
    differences = sum(finding.differences for finding in found.values())
    if as_json:
        rows = [
            {"check": name, "verdict": finding.verdict, "seen": finding.seen, "remedy": finding.remedy}
            for name, finding in found.items()
        ]
        print_json({"failed": len(failed), "differences": differences, "checks": rows})
    else:
        _print(found)
    if differences:
        raise ComparisonFailed(f"graphs gave wrong answers: {found['canary'].seen}")
    if failed:
        raise click.ClickException(f"{len(failed)} of {len(found)} checks failed: {', '.join(failed)}")


def check_versions() -> Finding:
    """Python, graphcache and PyTorch; a warning for a PyTorch that leaves an NVIDIA driver unused."""
    cuda = torch.version.cuda
    built = f"for CUDA {cuda}" if cuda else "without CUDA"
    seen = f"Python {platform.python_version()}, graphcache {graphcache.__version__}, "
    seen += f"torch {torch.__version__} (built {built})"
    if cuda is None and shutil.which("nvidia-smi"):
        return Finding("warning", f"{seen}, but an NVIDIA driver is here", "install a CUDA build of PyTorch to use it")
    return Finding("ok", seen)


def check_devices() -> Finding:
    """The CUDA devices that PyTorch sees, and the newest CUDA that their driver serves."""
    try:
        require_gpu("replaying CUDA graphs")
    except NoGpuError as error:
        return Finding("not here", "no CUDA device", one_line(error))
    try:
        version = driver.call("cuDriverGetVersion")
        serves = f"the driver serves CUDA up to {version // 1000}.{version % 1000 // 10}"
    except CudaError:
        serves = "the driver's version cannot be asked for without cuda-python"
    if (version_here := driver_version()) is not None:
        serves = f"driver {version_here}, {serves}"
    devices = "; ".join(f"{name}, compute capability {major}.{minor}" for name, (major, minor) in _devices())
    return Finding("ok", f"{devices}; {serves}")


def check_cuda_python() -> Finding:
    """cuda-python, without which there are no graphs on a device."""
    try:
        driver.binding()
    except CudaError as error:
        verdict: Verdict = "failed" if torch.cuda.is_available() else "not here"
        return Finding(verdict, "cuda.bindings cannot be imported", one_line(error))
    return Finding("ok", f"cuda.bindings {_version('cuda.bindings')}")


def check_native_code() -> Finding:
    """The library that answers hits and compares guards, compiled if need be."""
    native.loaded(wait=True)
    status = native.status()
    if status in ("active", native.OFF):
        return Finding("ok", status)
    return Finding("not here", "Python answers hits, which takes longer", status)


def check_tensorrt() -> Finding:
    """The flavour of TensorRT in use, and whether its maker supports these devices."""
    try:
        used = library()
    except TensorRTNotFoundError as error:
        broken = [flavour for flavour in get_args(Flavour) if _is_installed(flavour)]
        if broken:
            return Finding("failed", f"installed, but not to be used: {', '.join(broken)}", one_line(error))
        return Finding("not here", "no flavour of TensorRT", one_line(error))
    seen = f"{used.flavour} {used.version}"
    if not torch.cuda.is_available():
        builds = used.flavour == "tensorrt_rtx"
        return Finding("ok", f"{seen}; without a GPU it {'builds engines and runs none' if builds else 'does nothing'}")
    outside = [
        f"{name} (compute capability {major}.{minor})"
        for name, (major, minor) in _devices()
        if not ((major, minor) == (7, 5) or major in (8, 12))
    ]
    if used.flavour == "tensorrt_rtx" and outside:
        return Finding(
            "warning",
            f"{seen}, which NVIDIA does not support on {', '.join(outside)}; it is meant for compute capability 7.5, "
            "8.x and 12.x",
            "hold the eager answers of engines against another runtime, such as onnxruntime, before relying on them",
        )
    return Finding("ok", f"{seen}; it runs engines{', but builds none' if used.flavour == 'tensorrt_lean' else ''}")


def check_extra(name: str) -> Finding:
    """Whether the modules of an extra can be imported."""
    here, missing, broken = [], [], []
    for module in EXTRAS[name]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                importlib.import_module(module)
        except Exception as error:
            if isinstance(error, ModuleNotFoundError) and error.name == module:
                missing.append(module)
            else:
                broken.append(f"{module} cannot be imported: {raised(error)}")
        else:
            here.append(f"{module} {_version(module)}".rstrip())
    seen = "; ".join([*here, *broken, *(f"no {module}" for module in missing)])
    remedy = f'pip install "graphcache[{name}]"'
    if broken:
        return Finding("warning", seen, f"install it anew: {remedy}")
    return Finding("not here", seen, remedy) if missing else Finding("ok", seen)


def check_canary() -> Finding:
    """Whether graphs answer right after others were evicted and their memory overwritten."""
    on_cuda = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")
    outcome = canary(device)
    where = f"CUDA graphs on {torch.cuda.get_device_name(device)}" if on_cuda else "host graphs (no CUDA device)"
    if outcome.wrong:
        return Finding(
            "failed",
            f"{where}: {len(outcome.wrong)} times wrong. The first, {outcome.wrong[0]}",
            "set GRAPHCACHE_DISABLE=1, and report it with all that this command prints",
            len(outcome.wrong),
        )
    if outcome.info.hits != outcome.asked or outcome.reasons:
        return Finding(
            "warning" if set(outcome.reasons) == {Reason.DISABLED} else "failed",
            f"{where}: {outcome.info.hits} of {outcome.asked} answers came from graphs",
            " ".join(outcome.reasons.values()),
        )
    return Finding(
        "ok",
        f"{where}: {outcome.info.evictions} graphs evicted, their memory overwritten; {outcome.asked} replays of the "
        "others equal eager execution",
    )


def _guarded(check: Callable[[], Finding]) -> Finding:
    """What a check gave; a check that raises has failed, and the others still run."""
    try:
        return check()
    except GraphCacheError as error:
        return Finding("failed", one_line(error))
    except Exception as error:
        return Finding("failed", raised(error))


def _devices() -> list[tuple[str, tuple[int, int]]]:
    count = torch.cuda.device_count()
    return [(torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)) for index in range(count)]


def _is_installed(module: str) -> bool:
    """Whether a module is there to be imported; a folder that merely has its name is not."""
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None


def _version(module: str) -> str:
    return str(getattr(sys.modules.get(module), "__version__", ""))


def _print(found: dict[str, Finding]) -> None:
    rows = table("check", "verdict", "what was seen, and what to do")
    for column in rows.columns:
        column.justify = "left"
    for name, finding in found.items():
        text = "\n".join(line for line in (finding.seen, finding.remedy) if line)
        rows.add_row(name, Text(finding.verdict, style=_STYLES[finding.verdict]), text)
    stdout().print(rows)
