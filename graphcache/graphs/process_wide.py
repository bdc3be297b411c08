"""Settings of the whole process that several threads may need at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import wraps
from typing import Any


def process_wide(setting: Callable[[], AbstractContextManager[Any]]) -> Callable[[], AbstractContextManager[None]]:
    """Let any number of threads hold a setting: the first one to enter makes it, the last one to leave undoes it."""
    lock, made, users = threading.Lock(), ExitStack(), 0

    @wraps(setting)
    @contextmanager
    def shared() -> Iterator[None]:
        nonlocal users
        with lock:
            if not users:
                made.enter_context(setting())
            users += 1
        try:
            yield
        finally:
            with lock:
                users -= 1
                if not users:
                    made.close()

    return shared
