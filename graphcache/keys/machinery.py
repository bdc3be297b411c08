"""Threads, executors, futures and loggers: what of them a call may read, beside what their libraries keep in them."""

from __future__ import annotations

import asyncio
import concurrent.futures
import dis
import functools
import logging
import threading
import types
from typing import Any

from graphcache.keys.user_code import is_library

_KINDS = (
    *(concurrent.futures.Executor, concurrent.futures.Future, asyncio.AbstractEventLoop, threading.Thread),
    logging.Filterer,
)
"""Base classes of what runs and logs, whose own state is none of the module's."""
_PACKAGES = ("concurrent", "multiprocessing", "logging", "tokenizers")
_OF_LOGGERS = ("level", "disabled", "propagate", "handlers", "filters")


def is_machinery(kind: type) -> bool:
    """Whether objects of a class run or log something."""
    return issubclass(kind, _KINDS) or str(kind.__module__).partition(".")[0] in _PACKAGES


def names_of_libraries(kind: type) -> tuple[str, ...]:
    """The attributes that methods of libraries set on objects of a class."""
    bases: list[Any] = [each for each in kind.__mro__ if is_library(each.__module__)]
    return tuple(set().union(*map(_set_by, bases)))


@functools.cache
def _set_by(kind: Any) -> frozenset[str]:
    """The attributes that methods of a class set, its bases apart. Libraries have few such classes, for good."""
    functions = [value for value in vars(kind).values() if isinstance(value, types.FunctionType)]
    instructions = [each for function in functions for each in dis.get_instructions(function)]
    return frozenset(each.argval for each in instructions if each.opname == "STORE_ATTR")


def levels_of(logger: logging.Logger) -> list[tuple[str, dict[str, Any], tuple[str, ...]]]:
    """What decides whether a logger logs: names in the dictionaries of it, of those above it, and of their manager."""
    found: list[tuple[str, dict[str, Any], tuple[str, ...]]]
    found = [("logging.disable", vars(logger.manager), ("_disable",))]
    each: logging.Logger | None = logger
    while each is not None:
        found.append((f"logger {each.name}", vars(each), _OF_LOGGERS))
        each = each.parent
    return found
