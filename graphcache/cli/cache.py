"""``graphcache cache``: engines and kernels that were kept for later processes."""

from __future__ import annotations

import re
import time

import click

from graphcache.cli.output import print_json, stdout, table
from graphcache.engines.store import user_store

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,3})?)\s*([kmg]i?)?b?", re.IGNORECASE | re.ASCII)


class Bytes(click.ParamType):  # type: ignore[type-arg]  # not generic before click 8.3
    """A number of bytes, such as ``500M``, ``2GiB`` or ``1000``."""

    name = "bytes"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number; a usage error if it is none."""
        found = _SIZE.fullmatch(str(value).strip())
        if found is None:
            self.fail(f"{value!r} is no number of bytes; expected one such as 500M, 2GiB or 1000", param, ctx)
        return int(float(found[1]) * _UNITS[(found[2] or "").lower()])


@click.group()
def cache() -> None:
    """List or prune the engines and kernels that were kept.

    They lie in this user's cache folder. GRAPHCACHE_CACHE_DIR sets it, GRAPHCACHE_CACHE_MAX_BYTES what it may hold
    (10 GiB if it is not set).
    """


@cache.command("ls")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def list_(as_json: bool) -> None:
    """List what is kept, the most recently used first."""
    store = user_store()
    entries = store.entries()
    if as_json:
        print_json(
            {
                "folder": str(store.folder),
                "max_bytes": store.max_bytes,
                "entries": [
                    {"key": each.key, "kind": each.kind, "nbytes": each.nbytes, "used": each.used, "note": each.note}
                    for each in entries
                ],
            }
        )
        return
    console = stdout()
    if entries:
        rows = table("key", "kind", "MB", "hours ago", "made from")
        now = time.time()
        for each in entries:
            made = ", ".join(f"{value}" if name == "name" else f"{name} {value}" for name, value in each.note.items())
            rows.add_row(
                each.key[:16],
                each.kind,
                f"{each.nbytes / 1e6:.1f}",
                f"{max(now - each.used, 0) / 3600:.1f}",
                made.strip(", "),
            )
        console.print(rows)
    total = sum(each.nbytes for each in entries)
    console.print(
        f"{len(entries)} entries, {total / 1e6:.1f} of {store.max_bytes / 1e6:.0f} MB, in {store.folder}",
        soft_wrap=True,
    )


@cache.command("prune")
@click.option("--max-bytes", type=Bytes(), help="What may be left, such as 2GiB; the bound of the folder if left out.")
@click.option("--all", "everything", is_flag=True, help="Leave nothing.")
def prune(max_bytes: int | None, everything: bool) -> None:
    """Remove what was used least recently, and what killed processes have left."""
    if everything and max_bytes is not None:
        raise click.UsageError("--all and --max-bytes exclude each other")
    store = user_store()
    bound = 0 if everything else store.max_bytes if max_bytes is None else max_bytes
    removed, nbytes = store.prune(bound)
    click.echo(f"removed {removed} entries, {nbytes / 1e6:.1f} MB, from {store.folder}")
