"""``python -m graphcache.graphs.native`` compiles the library; with a path, it says whether that one agrees."""

import sys
from pathlib import Path

from graphcache.errors import GraphCacheError
from graphcache.graphs.native import load
from graphcache.graphs.native.build import build
from graphcache.graphs.native.probe import disagreement


def main(arguments: list[str]) -> int:
    """Compile, or compare the library at a path with Python; the exit code is 0 if all went well."""
    if arguments:
        difference = disagreement(load(Path(arguments[0])))
        if difference is not None:
            sys.stderr.write(f"it disagrees with Python about {difference}\n")
        return int(difference is not None)
    try:
        sys.stdout.write(f"{build()}\n")
    except GraphCacheError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
