"""Pickles of version 0.1 call :func:`again` by this name to make a wrapped module."""

from graphcache.modules.cached_module import again as again
