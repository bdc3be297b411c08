"""``graphcache completion``: what a shell needs to complete commands and options."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command(short_help="Print a script that completes commands in a shell.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print a script that completes commands, options and their values.

    For bash, put  eval "$(graphcache completion bash)"  into ~/.bashrc; zsh likewise. For fish, write it to
    ~/.config/fish/completions/graphcache.fish.

    \b
    Examples:
      graphcache completion bash
      graphcache completion fish
    """
    kind = get_completion_class(shell)
    assert kind is not None
    name = "graphcache"
    # The variable by which click is asked for completions; none of graphcache's own.
    made = kind(ctx.find_root().command, {}, name, f"_{name.upper()}_COMPLETE")
    # Not source(), which runs bash to learn its version.
    click.echo(made.source_template % made.source_vars())
