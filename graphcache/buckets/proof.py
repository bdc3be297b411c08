"""Whether calls may be padded to a bucket: tried once, before the first padded answer is given, and remembered.

Tried are the sizes of the first call that goes to the bucket, and the smallest ones that would, where modules do what
they do for no other size (a single row is broadcast). Each is tried with the values of that call and with values that
differ: zeros, ones and NaN, as in a warm-up, hide most dependences.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

import torch

from graphcache.buckets.host import Host, Key, Run
from graphcache.buckets.independence import dependence, observed_outputs
from graphcache.buckets.padder import Arguments, Fit, Padder
from graphcache.buckets.padding import varied
from graphcache.cache.key_table import KeyTable
from graphcache.capture.effects import Effects
from graphcache.capture.engine_like import EngineLike
from graphcache.config import graphs_off
from graphcache.errors import Cause, GraphCacheError, InputError, Reason, Refusal, shown
from graphcache.graphs.capture import refusal_of
from graphcache.keys.call import KeyedCall
from graphcache.keys.call_key import substitute

_MAX_KEYS = 1024
"""Buckets that are remembered; beyond that the oldest is forgotten and tried again."""


class Proofs:
    """What came of padding to each bucket, by the key of the padded call.

    Args:
        host: Runs the module.
        padder: Pads its calls.
    """

    def __init__(self, host: Host, padder: Padder) -> None:
        self._host = host
        self._padder = padder
        self._found: OrderedDict[tuple[int, Key], tuple[int, Padder]] = OrderedDict()
        """By the module's generation and the key: the module's version and what crops the answers."""
        self._refused = KeyTable(size=_MAX_KEYS)
        self._lock = threading.Lock()

    def found(self, key: Key) -> Padder | None:
        """What crops the answers of a bucket that may be padded to; ``None`` if that is not known."""
        version, padder = self._found.get((self._host.generation, key), (0, None))
        return padder if version == self._host.version else None

    def refused(self, key: Key) -> Cause | None:
        """Why a bucket is not to be tried this time."""
        return self._refused.denial((self._host.generation, key), self._host.version)

    def is_refused(self, key: Key) -> bool:
        """Whether a bucket is not to be tried, without counting a call."""
        known = self._refused.look((self._host.generation, key), self._host.version)
        return known is not None and known[1] != 0

    def refuse(self, key: Key, cause: Cause) -> Cause:
        """Remember why a bucket is not padded to, which is returned."""
        self._refused.deny((self._host.generation, key), cause, self._host.version)
        return cause

    def prove(self, call: KeyedCall, fit: Fit, key: Key, effects: Effects, *, alone: bool = False) -> Padder | Cause:
        """Find out whether a call that was answered may be padded; after a call with effects nothing is run again."""
        if effects.cause is not None:
            return self.refuse(key, effects.cause)
        try:
            with graphs_off(), torch.no_grad():
                padder = self._tried(self._host.runner(effects, alone=alone), fit, call)
        except Refusal as refusal:
            return self.refuse(key, refusal.cause)
        except Exception as error:
            cause = refusal_of(error, "").cause
            if cause.reason is Reason.CAPTURE_FAILED:
                text = str(error) if isinstance(error, GraphCacheError) else f"{type(error).__name__}: {error}"
                cause = Cause(Reason.PADDING, detail=f"a call of other sizes raised {shown(text)}")
            return self.refuse(key, cause)
        with self._lock:
            self._found[self._host.generation, key] = effects.version, padder
            if len(self._found) > _MAX_KEYS:
                self._found.popitem(last=False)
        return padder

    def _tried(self, run: Run, fit: Fit, call: KeyedCall) -> Padder:
        """What crops padded calls; raises ``Refusal`` if an answer depends on padding, or a call has effects."""
        padder, given = self._padder, (call.args, call.kwargs)
        if padder.buckets.outputs is None:
            padder = padder.with_outputs(observed_outputs(run, *given, padder))
        for arguments in given, _varied(run, call):
            if arguments is None:
                continue
            for each in arguments, self._smallest(fit, arguments):
                if each is not None and (text := dependence(run, *each, padder)) is not None:
                    raise Refusal(Reason.PADDING, detail=text)
        return padder

    def _smallest(self, fit: Fit, given: Arguments) -> Arguments | None:
        """The start of a call, of the smallest sizes that go to the same bucket; ``None`` if it has these itself."""
        buckets = self._padder.buckets.sizes
        below = {name: max((size for size in buckets[name] if size < fit.padded[name]), default=0) for name in fit.real}
        sizes = {name: size + 1 for name, size in below.items()}
        if sizes == fit.real:
            return None
        arguments = self._padder.start(sizes, *given)
        if isinstance(self._host.module, EngineLike):
            try:
                self._host.module.checked(arguments[0])
            except InputError:
                # No profile takes it, so no call will have these sizes.
                return None
        return arguments


def _varied(run: Run, call: KeyedCall) -> Arguments | None:
    """A call with values that differ, as those of a warm-up often don't; ``None`` if the module refuses them."""
    made = {id(tensor): varied(tensor) for tensor in call.tensors}
    args, kwargs = substitute(call.args, call.kwargs, [made[id(tensor)] for tensor in call.tensors])
    try:
        run(*args, **kwargs)
    except (Refusal, torch.cuda.OutOfMemoryError):
        raise
    except Exception:
        return None
    return args, kwargs
