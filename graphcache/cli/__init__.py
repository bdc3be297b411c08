"""The command line, in the words of trtexec and Polygraphy.

Exit codes: 0 if all went well, 1 if something was wrong with what was given or what is installed (one line on stderr,
no traceback), 2 for a usage error, 3 if a comparison failed: an answer differed, or a module cannot be captured.
Results go to stdout, progress to stderr. ``NO_COLOR`` is honoured.
"""

from __future__ import annotations

import logging
from typing import Any

import click

import graphcache
from graphcache.cli.bench import bench
from graphcache.cli.build import build
from graphcache.cli.cache import cache
from graphcache.cli.compile import compile_
from graphcache.cli.completion import completion
from graphcache.cli.demo import demo
from graphcache.cli.doctor import doctor
from graphcache.cli.env import env
from graphcache.cli.export import export
from graphcache.cli.inspect import inspect
from graphcache.cli.output import one_line
from graphcache.cli.prepare import prepare
from graphcache.cli.report import report
from graphcache.cli.run import run
from graphcache.cli.serve import serve
from graphcache.errors import GraphCacheError


class _Group(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        # In the order in which a newcomer meets them.
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except GraphCacheError as error:
            raise click.ClickException(one_line(error)) from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(graphcache.__version__, prog_name="graphcache")
@click.option("-v", "--verbose", count=True, help="Log what happens on stderr; twice for every detail.")
def main(verbose: int) -> None:
    """Run TensorRT engines and PyTorch modules through a cache of CUDA graphs."""
    log = logging.getLogger("graphcache")
    if verbose:
        logging.basicConfig(format="%(name)s: %(message)s")
        log.setLevel(logging.DEBUG if verbose > 1 else logging.INFO)
    elif not log.handlers:
        # The reasons are part of every result, so that logging's last resort need not say them again.
        log.addHandler(logging.NullHandler())


for command in (
    *(demo, build, inspect, run, bench, prepare, serve, report),
    *(doctor, env, cache, export, compile_, completion),
):
    main.add_command(command)
