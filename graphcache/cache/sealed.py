"""A JSON file that is there as a whole or not at all, and is believed only if nothing in it has changed.

Processes that write one file do not disturb one another or those who read it: each writes a file of its own beside it,
and moves that to its place, which the system does in one step. The last one wins.
"""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any

from graphcache.errors import shown
from graphcache.files import open_regular, replacing

MOST_BYTES = 4 * 2**20
"""Of a file, which bounds the memory (some 30 times as much) and the time (seconds) that reading takes."""
_MOST_DIGITS = 400
Path = str | os.PathLike[str]


class Damaged(Exception):
    """A file that cannot be believed.

    Args:
        field: Where in the file; empty for the file as a whole.
        text: What was seen there, and what was expected.
    """

    def __init__(self, field: str, text: str) -> None:
        self.field, self.text = field, text
        super().__init__(f"{field}: {text}" if field else text)


def write_sealed(path: Path, kind: str, version: int, body: Any) -> None:
    """Write a file in one step, durably.

    Args:
        path: Of the file; its directory must exist. A symbolic link is replaced.
        kind: What the file holds, such as ``"graphcache.manifest"``.
        version: Of what it holds.
        body: What it holds, as JSON has it.

    Raises:
        OSError: If it cannot be written; the file that was there is as it was.
        ValueError: If the body is no JSON, or larger than what is read.
    """
    data = sealed(kind, version, body)
    with replacing(path) as file:
        file.write(data)


def sealed(kind: str, version: int, body: Any) -> bytes:
    """What such a file holds.

    Raises:
        ValueError: If the body is no JSON, or larger than what is read.
    """
    content = _canonical(body)
    head = _canonical({"format": kind, "version": version, "digest": _digest(kind, version, content)})
    data = f'{head[:-1]},"body":{content}}}\n'.encode("ascii")
    if len(data) > MOST_BYTES:
        raise ValueError(f"{len(data)} bytes; expected at most {MOST_BYTES}, which is what is read")
    return data


def read_sealed(path: Path, kind: str, version: int) -> Any:
    """The body of a file.

    Args:
        path: Of the file.
        kind: What it should hold.
        version: Of what it should hold.

    Raises:
        Damaged: If there is no such file, or it is not as :func:`write_sealed` wrote it.
    """
    try:
        data = _bytes_of(path)
    except OSError as error:
        raise Damaged("", error.strerror or type(error).__name__) from error
    except ValueError as error:
        raise _not_as_written(error) from error
    return unsealed(data, kind, version)


def unsealed(data: bytes, kind: str, version: int) -> Any:
    """The body of what :func:`sealed` gave.

    Raises:
        Damaged: If that is not what it gave.
    """
    if len(data) > MOST_BYTES:
        raise Damaged("", f"{len(data)} bytes; expected at most {MOST_BYTES}")
    try:
        text = data.decode("ascii")
        document = json.loads(
            text, object_pairs_hook=_object, parse_constant=_constant, parse_int=_whole, parse_float=_real
        )
        return _body(document, kind, version)
    except (ValueError, RecursionError, MemoryError) as error:
        raise _not_as_written(error) from error


def _not_as_written(error: BaseException) -> Damaged:
    return Damaged("", f"not as it was written: {type(error).__name__}: {str(error)[:200]}")


def _body(document: Any, kind: str, version: int) -> Any:
    if type(document) is not dict or document.get("format") != kind:
        raise Damaged("format", f"{_of(document, 'format')} in place of {kind!r}")
    if type(document.get("version")) is not int or document["version"] != version:
        raise Damaged("version", f"{_of(document, 'version')}; this is a reader of version {version}")
    if document.keys() != {"format", "version", "digest", "body"}:
        raise Damaged("", f"the fields {shown(sorted(document))}; expected format, version, digest and body")
    if document["digest"] != _digest(kind, version, _canonical(document["body"])):
        raise Damaged("digest", "not that of the body: something changed after it was written")
    return document["body"]


def _bytes_of(path: Path) -> bytes:
    with open_regular(path) as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ValueError(f"more than {MOST_BYTES} bytes")
    return data


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _digest(kind: str, version: int, content: str) -> str:
    return hashlib.sha256(f"{kind}\n{version}\n{content}".encode("ascii")).hexdigest()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


def _constant(text: str) -> None:
    raise ValueError(f"{text} is no number of JSON")


def _whole(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _real(text: str) -> float:
    number = float(text)
    if number - number != 0:
        raise ValueError(f"{text[:20]} is beyond all numbers")
    return number


def _of(document: Any, name: str) -> str:
    if type(document) is not dict:
        return f"a {type(document).__name__}"
    return shown(document[name]) if name in document else "nothing"
