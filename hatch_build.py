"""Compiles native code into the wheel, where a C compiler and Python's headers are; otherwise the wheel is pure."""

from __future__ import annotations

import runpy
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class NativeCode(BuildHookInterface[Any]):
    """Adds the library to the wheel under the name by which ``graphcache/native/compiler.py`` looks for it."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile the library; an editable installation compiles it at the first use instead."""
        recipe = runpy.run_path(str(Path(self.root, "graphcache", "native", "recipe.py")))
        if version == "editable" or recipe["unsupported"]():
            return
        self._folder = tempfile.TemporaryDirectory()
        library = Path(self._folder.name, "library.so")
        try:
            recipe["compile_to"](library)
        except recipe["NotCompiled"] as why:
            self.app.display_warning(f"a wheel without native code: {why}")
            return
        build_data["force_include"][str(library)] = f"graphcache/native/{recipe['key']()}.so"
        build_data["pure_python"] = False
        build_data["infer_tag"] = True

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what was compiled, which the wheel has."""
        if hasattr(self, "_folder"):
            self._folder.cleanup()
