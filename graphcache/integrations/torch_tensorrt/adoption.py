"""Engines of Torch-TensorRT's modules, run by graphcache for as long as a module is wrapped."""

from __future__ import annotations

import threading
from contextlib import nullcontext

import torch
from torch import nn

from graphcache.capture.engine_like import is_foreign
from graphcache.config import Runtime
from graphcache.errors import ConfigError, GraphCacheError
from graphcache.events import log
from graphcache.integrations.torch_tensorrt.adopted_engine import AdoptedEngine
from graphcache.integrations.torch_tensorrt.foreign import described


class Adoption:
    """Puts an engine in the place of every module of Torch-TensorRT inside a module, until it is ended.

    The engine has the bytes, the order of inputs and outputs, and the device of what it stands for; names, hooks, state
    and the training flag are that one's. There is a second copy of its weights on the device meanwhile, since the other
    module keeps its own. Whoever wraps the same module twice has the same engines.

    With ``"graphcache"`` all are adopted, or an error is raised and nothing is changed; with ``"torch_tensorrt"`` none;
    with ``None`` those that can be, and the others are left to Torch-TensorRT, which is logged.
    """

    def __init__(self, module: nn.Module, runtime: Runtime | None) -> None:
        self.module = module
        """What is to be called: the module itself, or the engine that stands for it."""
        self._held: list[AdoptedEngine] = []
        if not isinstance(module, nn.Module):
            return
        with _lock:
            if runtime == "torch_tensorrt":
                if any(isinstance(each, AdoptedEngine) for each in module.modules()):
                    raise ConfigError(
                        f"runtime='torch_tensorrt': engines in {type(module).__name__} are adopted by another wrapped "
                        f"module; close that one first"
                    )
                if not any(is_foreign(each) for each in module.modules()):
                    raise ConfigError(
                        f"runtime='torch_tensorrt': there is no module of Torch-TensorRT in {type(module).__name__}; "
                        f"expected one that torch_tensorrt compiled, or runtime=None"
                    )
                return
            try:
                self._take(module, must=runtime == "graphcache")
            except BaseException:
                self._give_back()
                raise

    def __bool__(self) -> bool:
        return bool(self._held)

    def end(self) -> None:
        """Put everything back that nobody else has wrapped, exactly as it was; twice does nothing."""
        with _lock:
            self._give_back()

    def _take(self, module: nn.Module, *, must: bool) -> None:
        made: dict[int, AdoptedEngine] = {}
        if is_foreign(module):
            if (engine := _adopted(module, type(module).__name__, must)) is not None:
                self.module = engine
                self._hold(engine)
            return
        for path, parent in list(module.named_modules()):
            for key, child in list(parent._modules.items()):
                if isinstance(child, AdoptedEngine):
                    if child not in self._held:
                        self._hold(child)
                elif child is not None and is_foreign(child):
                    name = f"{path}.{key}" if path else key
                    engine = made.get(id(child)) or _adopted(child, name, must)
                    if engine is not None:
                        if id(child) not in made:
                            made[id(child)] = engine
                            self._hold(engine)
                        engine.places.append((parent, key))
                        # Past nn.Module's __setattr__: the same place in the same table.
                        parent._modules[key] = engine

    def _hold(self, engine: AdoptedEngine) -> None:
        engine.holders += 1
        self._held.append(engine)

    def _give_back(self) -> None:
        held, self._held = self._held, []
        for engine in held:
            engine.holders -= 1
            if engine.holders:
                continue
            places, engine.places = engine.places, []
            original = engine.give_back()
            for parent, key in places:
                # Unless somebody has put something else there.
                if parent._modules.get(key) is engine:
                    parent._modules[key] = original


def _adopted(module: nn.Module, name: str, must: bool) -> AdoptedEngine | None:
    found = described(module)
    count = torch.cuda.device_count()
    if not isinstance(found, str) and found.device is not None and found.device >= count > 0:
        found = f"its device is cuda:{found.device}, and there are {count} here"
    if isinstance(found, str):
        if must:
            raise ConfigError(f"runtime='graphcache': {name} cannot be adopted: {found}; leave runtime=None")
        log.info("%s is left to Torch-TensorRT: %s", name, found)
        return None
    try:
        with nullcontext() if found.device is None or not count else torch.cuda.device(found.device):
            return AdoptedEngine(module, found)
    except GraphCacheError as error:
        if must:
            raise
        log.warning("%s is left to Torch-TensorRT: %s", name, error)
        return None


_lock = threading.RLock()
"""Held while modules are exchanged: those of one model may be wrapped and given back in several threads."""
