"""``graphcache compile``: native code for the Python that is installed, now."""

from __future__ import annotations

import click

from graphcache import native
from graphcache.cli.options import json_option
from graphcache.cli.output import print_json, progress


@click.command("compile", short_help="Compile native code now, and say whether it can be used.")
@json_option
def compile_(as_json: bool) -> None:
    """Compile native code now, and say where it is, or why it cannot be used.

    Nothing needs this: it comes with the wheel, or is compiled in the background at the first use, in about a second.
    An image of a container may have it done beforehand, with the compiler that it then leaves out.

    \b
    Examples:
      graphcache compile
      graphcache compile --json
    """
    with progress("compiling"):
        path = native.compile_now()
    if as_json:
        print_json({"library": str(path)})
    else:
        click.echo(path)
