"""``python -m graphcache``."""

from graphcache.cli import main

if __name__ == "__main__":
    main(prog_name="graphcache")
