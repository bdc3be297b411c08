"""Running a part of a benchmark in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence


class NothingRecordedError(RuntimeError):
    """The process ended without a result; the message says how."""


def again(module: str, arguments: Sequence[str], name: str) -> dict[str, Any]:
    """Run ``python -m MODULE`` and read what it recorded.

    What it prints on stderr is seen at once; its tables are not, since its figures become part of this process's own.

    Args:
        module: A benchmark that takes ``--out DIR`` and writes ``NAME.json`` there.
        arguments: Its other arguments.
        name: Of that file, without its ending.

    Raises:
        NothingRecordedError: If there is no such file, or none that was written whole.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", module, *arguments, "--out", folder]
        # Its exit code is a verdict on what it recorded, which is given again where that becomes part of the whole.
        code = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=False).returncode
        try:
            found: dict[str, Any] = json.loads((Path(folder) / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
            raise NothingRecordedError(f"a process of its own {how} and recorded nothing") from error
    return found
