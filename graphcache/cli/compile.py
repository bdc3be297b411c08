"""``graphcache compile``: the optional accelerator, for the torch that is installed."""

from __future__ import annotations

import click

from graphcache.cli.output import progress
from graphcache.graphs.native.build import build


@click.command("compile")
def compile_() -> None:
    """Compile the optional accelerator of cache hits, once for each torch and Python.

    It needs a C++ compiler and takes about half a minute. Set GRAPHCACHE_NATIVE=0 to run without it.
    """
    with progress("compiling"):
        path = build()
    click.echo(path)
