"""Pickles of version 0.1 find :class:`~graphcache.modules.engine_source.Source` under this name."""

from graphcache.modules.engine_source import Source as Source
