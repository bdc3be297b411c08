"""``graphcache env``: versions, devices and settings, for a report of a problem."""

from __future__ import annotations

import click

from graphcache.cli.machine import machine
from graphcache.cli.options import json_option
from graphcache.cli.output import print_json, stdout, table


@click.command(short_help="Print versions, devices and settings.")
@json_option
def env(as_json: bool) -> None:
    """Print the versions of everything that matters, the devices, and the GRAPHCACHE_ variables that are set.

    Nothing is checked; that is what doctor does.

    \b
    Examples:
      graphcache env
      graphcache env --json
    """
    found = machine()
    if as_json:
        print_json(found)
        return
    rows = table("", "")
    rows.show_header = False
    for column in rows.columns:
        column.justify = "left"
    rows.add_row("graphcache", f"{found['graphcache']}, Python {found['python']}, {found['system']}")
    rows.add_row("torch", f"{found['torch']}, built {_for(found['torch_cuda'])}")
    rows.add_row("driver", f"{found['driver']}, serves CUDA {found['driver_cuda']}" if found["driver"] else "none")
    rows.add_row("devices", "\n".join(found["devices"]) or "no CUDA device")
    rows.add_row("cuda-python", found["cuda_python"] or "not installed")
    rows.add_row("TensorRT", found["tensorrt"] or "not installed")
    for extra, modules in found["extras"].items():
        told = [f"{module} {version}" if version else f"no {module}" for module, version in modules.items()]
        how = "" if all(modules.values()) else f'; pip install "graphcache[{extra}]"'
        rows.add_row(f"extra {extra}", f"{', '.join(told)}{how}")
    rows.add_row("variables", "\n".join(f"{name}={value}" for name, value in found["variables"].items()) or "none set")
    stdout().print(rows)


def _for(cuda: str | None) -> str:
    return f"for CUDA {cuda}" if cuda else "without CUDA"
