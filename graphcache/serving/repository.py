"""A folder of models: what is in it, and what changed since it was looked at last.

::

    models/
      policy/                    a model's name
        config.json              options, buckets and what to prepare; may be left out
        1/model.engine           a version: an engine,
        2/model.gcache           or a package that module.save() wrote
      detector.gcache            a model of one file, which is version 1
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from graphcache.errors import ServingError, shown
from graphcache.serving.model_config import ModelConfig, read_config

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""What a model may be called: it becomes part of a path, of a URL and of a label."""
_VERSION = re.compile(r"[1-9][0-9]{0,8}")
SUFFIXES = (".engine", ".plan", ".gcache")
CONFIG = "config.json"


@dataclass(frozen=True)
class ModelVersion:
    """One version of a model.

    Args:
        number: Of the version.
        path: Of the engine or package, inside the repository.
        state: Tells one content of the file from another: its size in bytes and when it was written, in nanoseconds.
    """

    number: int
    path: Path
    state: tuple[int, int]


@dataclass(frozen=True)
class Model:
    """One model of a repository.

    Args:
        name: Under which it is served.
        versions: At least one, the oldest first.
        config: How it is wrapped and prepared.
    """

    name: str
    versions: tuple[ModelVersion, ...]
    config: ModelConfig

    @property
    def newest(self) -> ModelVersion:
        """That of the highest number."""
        return self.versions[-1]


@dataclass(frozen=True)
class Scan:
    """What a repository held at one moment.

    Args:
        models: By name. One with a problem is not among them.
        problems: What is wrong with others, by name.
    """

    models: Mapping[str, Model] = field(default_factory=dict)
    problems: Mapping[str, ServingError] = field(default_factory=dict)


@dataclass(frozen=True)
class Changes:
    """What differs between two scans, as pairs of name and number.

    Args:
        added: Versions that are there now, and changed ones.
        removed: Versions that are no longer there, and changed ones, as they were.

    Example:
        >>> bool(Changes())
        False
    """

    added: tuple[tuple[str, int], ...] = ()
    removed: tuple[tuple[str, int], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.added or self.removed)


class Repository:
    """A folder of models. It reads names, sizes and ``config.json``, and loads nothing.

    A name that begins with a dot is left alone, as that of a file that is being written. What a symbolic link leads to
    has to lie in the folder.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    def scan(self) -> Scan:
        """Look at all models. One that is wrong stands in the problems and leaves the others as they are."""
        try:
            root = self.folder.resolve(strict=True)
            entries = _visible(root)
        except (OSError, RuntimeError, ValueError) as error:
            raise ServingError(f"{self.folder} cannot be read: {_why(error)}; expected a folder of models") from error
        models: dict[str, Model] = {}
        problems: dict[str, ServingError] = {}
        for entry in entries:
            try:
                model = _model(entry, root)
                if model is not None and model.name in models:
                    raise ServingError(f"{entry}: there is another model {model.name!r}; remove one of them")
                if model is not None:
                    models[model.name] = model
            except ServingError as error:
                problems[_name(entry)] = error
            except OSError as error:
                problems[_name(entry)] = ServingError(f"{entry} cannot be read: {_why(error)}")
        return Scan(models, problems)


def changes(before: Scan, after: Scan) -> Changes:
    """What to load and what to give up between two scans.

    A version whose file or whose model's ``config.json`` changed is in both. A model that has a problem now is not
    removed: what was loaded of it goes on until the folder is right again, and ``before`` is then what was loaded.
    """
    old, new = dict(_versions(before)), dict(_versions(after))
    return Changes(
        tuple(each for each, state in new.items() if old.get(each) != state),
        tuple(
            each
            for each, state in old.items()
            if new.get(each) != state and (each[0] in after.models or each[0] not in after.problems)
        ),
    )


def _versions(scan: Scan) -> Iterator[tuple[tuple[str, int], object]]:
    for model in scan.models.values():
        for version in model.versions:
            yield (model.name, version.number), (version, model.config)


def _model(entry: Path, root: Path) -> Model | None:
    if entry.is_dir():
        name = _checked(entry)
        _inside(entry, root)
        config, versions = ModelConfig(), []
        for each in _visible(entry):
            if each.name == CONFIG:
                config = read_config(_inside(each, root))
            elif _VERSION.fullmatch(each.name) and each.is_dir():
                versions.append(_version(int(each.name), each, root))
        if not versions:
            raise ServingError(f"{entry} has no version; expected a folder such as {entry / '1'} with model.engine")
        return Model(name, tuple(sorted(versions, key=lambda version: version.number)), config)
    if entry.suffix not in SUFFIXES:
        return None
    return Model(_checked(entry), (_file(1, entry, root),), ModelConfig())


def _version(number: int, folder: Path, root: Path) -> ModelVersion:
    _inside(folder, root)
    found = [each for each in _visible(folder) if each.stem == "model" and each.suffix in SUFFIXES]
    if len(found) != 1:
        names = ", ".join(each.name for each in found) or "none"
        raise ServingError(f"{folder} holds {names}; expected one of {', '.join(f'model{each}' for each in SUFFIXES)}")
    return _file(number, found[0], root)


def _file(number: int, path: Path, root: Path) -> ModelVersion:
    real = _inside(path, root)
    if not real.is_file():
        raise ServingError(f"{path} is no regular file; expected an engine or a package")
    status = real.stat()
    return ModelVersion(number, path, (status.st_size, status.st_mtime_ns))


def _inside(path: Path, root: Path) -> Path:
    """Where a path really leads."""
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise ServingError(f"{path} leads nowhere: {_why(error)}") from error
    if not real.is_relative_to(root):
        raise ServingError(f"{path} leads out of the repository, to {real}; copy it there instead")
    return real


def _name(entry: Path) -> str:
    """Of the model that an entry of the folder is."""
    return entry.stem if entry.suffix in SUFFIXES and not entry.is_dir() else entry.name


def _checked(entry: Path) -> str:
    name = _name(entry)
    if not NAME.fullmatch(name):
        raise ServingError(
            f"{shown(str(entry))}: {shown(name)} is no name of a model; expected up to 128 letters, digits, '.', '_' "
            f"and '-', the first of them a letter or a digit"
        )
    return name


def _visible(folder: Path) -> list[Path]:
    return sorted(each for each in folder.iterdir() if not each.name.startswith("."))


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
