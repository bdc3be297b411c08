"""How a model is served, as it travels to every process that serves it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from graphcache.config import GraphConfig
from graphcache.errors import ConfigError, ServingError, shown
from graphcache.serving.repository import Repository
from graphcache.serving.sources import named

MOST_ROWS = 32
"""Rows that are put together where nobody said how many."""
MOST_KINDS = 8
"""Kinds of requests whose graphs are kept where nobody said how many."""


@dataclass(frozen=True)
class Settings:
    """How a model is served.

    Args:
        source: As :func:`~graphcache.serving.sources.module_of` takes it.
        name: Under which it is served; that of the source if empty.
        into: For a package of a model: what makes the model.
        device: Where a module that a function made goes; ``None`` leaves it there.
        buckets: Sizes of the rows, such as ``[1, 8, 32]``; or sizes by input and axis, as the ``buckets`` option has
            them. Where they do not name axis 0, it has the sizes of ``rows``.
        rows: Sizes of the rows, where ``buckets`` do not give them; ``None`` means powers of two.
        prepare: Requests, one for each kind to capture before serving: from each input to a tensor, or to a shape (of
            a module's input, float32). How many rows they have does not matter: every size of the rows is captured.
        config: Options of :class:`~graphcache.GraphConfig`, but ``buckets``.
        max_batch_size: Rows that are put together at most.
        max_kinds: Kinds of requests whose graphs one process keeps.
        version: Under which it is served at first; each reload has the next one.

    Raises:
        ConfigError: Naming the option.

    Example:
        >>> Settings("models/policy.engine", buckets=[1, 8]).name
        'policy'
    """

    source: Any
    name: str = ""
    into: Any = None
    device: str | None = None
    buckets: Any = None
    rows: Any = None
    prepare: tuple[Mapping[str, Any], ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    max_batch_size: int = MOST_ROWS
    max_kinds: int = MOST_KINDS
    version: int = 1

    def __post_init__(self) -> None:
        for option in ("max_batch_size", "max_kinds", "version"):
            value = getattr(self, option)
            if type(value) is not int or value < 1:
                raise ConfigError(f"{option}={shown(value)}: expected a whole number, 1 or more")
        if not isinstance(self.prepare, (list, tuple)) or not all(isinstance(each, Mapping) for each in self.prepare):
            raise ConfigError(f"prepare={shown(self.prepare)}: expected requests, each a mapping from input to shape")
        if not isinstance(self.name, str):
            raise ConfigError(f"name={shown(self.name)}: expected text")
        if not isinstance(self.config, Mapping):
            raise ConfigError(f"config={shown(self.config)}: expected options of graphcache.GraphConfig by name")
        if "buckets" in self.config:
            raise ConfigError("config['buckets']: requests are padded before they are put together; expected buckets=")
        # What is wrong with an option is told before a process is started for it.
        GraphConfig.of(self.config)
        object.__setattr__(self, "prepare", tuple(self.prepare))
        object.__setattr__(self, "name", self.name or named(self.source))


def checked_wait(seconds: Any, option: str) -> float:
    """How long the first request of a batch waits for others, in seconds.

    Args:
        seconds: What was given.
        option: What it was given as.

    Raises:
        ConfigError: If it is no number from 0 to 60.

    Example:
        >>> checked_wait(0, "wait_s")
        0.0
    """
    is_number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
    if not is_number or not 0 <= seconds < 60:
        raise ConfigError(f"{option}={shown(seconds)}: expected seconds from 0 to 60")
    return float(seconds)


def from_folder(folder: str | os.PathLike[str], options: Mapping[str, Any]) -> dict[str, Settings]:
    """The newest version of every model in a folder, by name.

    Args:
        folder: As :class:`~graphcache.serving.repository.Repository` has it.
        options: Of all of them, such as ``{"max_batch_size": 8}``.

    Raises:
        ServingError: If it holds no models, or one that is wrong.
        ConfigError: For options that mean nothing.

    Example:
        >>> from_folder("/nowhere", {})
        Traceback (most recent call last):
        graphcache.errors.ServingError: /nowhere cannot be read: No such file or directory; expected a folder of models
    """
    scan = Repository(folder).scan()
    for problem in scan.problems.values():
        raise problem
    if not scan.models:
        raise ServingError(f"{folder} holds no models; expected NAME/1/model.engine or NAME.gcache in it")
    found = {}
    for name, model in scan.models.items():
        config = dict(model.config.options)
        found[name] = Settings(
            str(model.newest.path),
            name=name,
            buckets=config.pop("buckets", None),
            prepare=model.config.prepare,
            config=config,
            version=model.newest.number,
            **options,
        )
    return found
