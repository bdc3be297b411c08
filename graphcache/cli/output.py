"""Results on stdout, progress on stderr and only where somebody watches."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import click
import torch
from rich.console import Console
from rich.table import Table

import graphcache
from graphcache import CachedModule, Cause, Reason
from graphcache.engines.library import library
from graphcache.errors import GraphCacheError
from graphcache.events import Event, RanEagerly
from graphcache.files import replacing
from graphcache.modules.transparent import controls
from graphcache.observe.result import Result

_PLAIN_WIDTH = 120
_REASONS = {reason.value: reason for reason in Reason}


class ComparisonFailed(click.ClickException):
    """An answer differed from eager execution: exit code 3."""

    exit_code = 3


def one_line(error: BaseException | str) -> str:
    """A message without line breaks."""
    return " ".join(str(error).split())


def stdout() -> Console:
    """For results. Colours only on a terminal, and not where ``NO_COLOR`` is set."""
    return Console(markup=False, highlight=False, emoji=False, width=None if sys.stdout.isatty() else _PLAIN_WIDTH)


@contextmanager
def progress(message: str) -> Iterator[Callable[[str], None]]:
    """Shows a line while a block runs, if stderr is a terminal.

    Nothing is drawn between two updates: a spinner has a thread of its own, which would show in what is measured here.
    """

    def show(text: str) -> None:
        if sys.stderr.isatty():
            width = shutil.get_terminal_size().columns - 1
            click.echo(f"\r\x1b[2K{text[:width]}", nl=False, err=True)

    show(message)
    try:
        yield show
    finally:
        show("")


@contextmanager
def writing(target: Path, option: str) -> Iterator[IO[bytes]]:
    """A file that takes the place of ``target`` once the block has ended well; else nothing is left of it."""
    if target.is_dir():
        raise click.ClickException(f"{target} is a directory; choose another {option}")
    with ExitStack() as replaced:
        try:
            file = replaced.enter_context(replacing(target))
        except OSError as error:
            raise unwritable(target, option, error) from error
        yield file
        try:
            replaced.close()
        except OSError as error:
            raise unwritable(target, option, error) from error


def check_writable(target: Path | None, option: str) -> None:
    """Refuse a place that cannot be written before anything is measured for it; nothing is written."""
    if target is None:
        return
    if target.is_dir():
        raise click.ClickException(f"{target} is a directory; choose another {option}")
    if not target.parent.is_dir():
        raise click.ClickException(f"{target} cannot be written (No such directory); choose another {option}")
    if not os.access(target.parent, os.W_OK):
        raise click.ClickException(f"{target} cannot be written (Permission denied); choose another {option}")


def unwritable(target: Path, option: str, error: OSError) -> click.ClickException:
    """What to raise when a file cannot be written."""
    return click.ClickException(f"{target} cannot be written ({error.strerror}); choose another {option}")


def print_json(result: Mapping[str, Any]) -> None:
    """One JSON object on stdout."""
    click.echo(json.dumps(result, indent=2))


def table(*columns: str) -> Table:
    """A table whose first column is text and whose other columns are numbers."""
    made = Table(box=None, pad_edge=False, header_style="bold", collapse_padding=True, padding=(0, 3, 0, 0))
    for index, column in enumerate(columns):
        made.add_column(column, justify="right" if index else "left", overflow="fold")
    return made


class Causes:
    """Hears why calls run eagerly."""

    def __init__(self, *modules: CachedModule) -> None:
        self._first: dict[str, Cause] = {}
        for module in modules:
            controls(module).subscribe(self._hear)

    def explain(self, name: str) -> str:
        """A reason with its sentence, where it first arose, what was seen there, and what would change it."""
        return one_line(str(self._first.get(name) or Cause(_REASONS[name])))

    def _hear(self, event: Event) -> None:
        if isinstance(event, RanEagerly):
            self._first.setdefault(event.cause.reason.value, event.cause)


def save_result(result: Result, target: Path | None, option: str) -> None:
    """Write a result, if that was asked for."""
    if target is not None:
        try:
            result.save(target)
        except OSError as error:
            raise unwritable(target, option, error) from error


def environment(device: torch.device, *, tensorrt: bool = False) -> dict[str, str]:
    """What a figure depends on: the device and the versions."""
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    else:
        name = f"CPU, {platform.machine()}, {torch.get_num_threads()} threads"
    found = {
        "device": name,
        "graphcache": graphcache.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if tensorrt:
        found.update(tensorrt_version())
    return found


def tensorrt_version(name: str | None = None) -> dict[str, str]:
    """The flavour and version of TensorRT in use; nothing where none can be imported."""
    try:
        used = library(name)
    except GraphCacheError:
        return {}
    return {used.flavour: used.version}


def described(versions: Mapping[str, str]) -> str:
    """The device and the versions in one line."""
    return ", ".join(version if name == "device" else f"{name} {version}" for name, version in versions.items())
