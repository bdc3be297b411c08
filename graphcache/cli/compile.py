"""``graphcache compile``: the optional accelerator, for the torch that is installed."""

from __future__ import annotations

import click

from graphcache.cli.options import json_option
from graphcache.cli.output import print_json, progress
from graphcache.graphs.native.build import build


@click.command("compile", short_help="Compile the optional library that answers hits faster.")
@json_option
def compile_(as_json: bool) -> None:
    """Compile the optional accelerator of cache hits, once for each torch and Python.

    It needs a C++ compiler and takes about half a minute. Set GRAPHCACHE_NATIVE=0 to run without it.

    \b
    Examples:
      graphcache compile
      graphcache compile --json
    """
    with progress("compiling"):
        path = build()
    if as_json:
        print_json({"library": str(path)})
    else:
        click.echo(path)
