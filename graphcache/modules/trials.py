"""Whether the calls that go to a bucket may be padded to it, tried at the first of them and remembered."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from graphcache.cache.blocks import Blocks
from graphcache.cache.buckets import Buckets, InputAxis
from graphcache.cache.independence import Run, dependence, observed_outputs
from graphcache.cache.padder import Call, Fit, Padder
from graphcache.cache.padding import cropped, varied
from graphcache.capture.torch_recorder import Running, TorchRecorder
from graphcache.config import graphs_off
from graphcache.dispatch.dispatcher import Misses
from graphcache.errors import Cause, GraphCacheError, InputError, Reason, Refusal, shown
from graphcache.graphs.capture import refusal_of
from graphcache.graphs.verify import padded_gap
from graphcache.keys.call_key import Signature, describe, substitute
from graphcache.modules.engine import EngineModule

_MOST = 1024


class Trials:
    """What came of padding to each bucket, by the signature of the padded call.

    Tried are the sizes of the first call that goes to the bucket, and the smallest ones that would, where modules do
    what they do for no other size (a single row is broadcast). Each is tried with the values of that call and with
    values that differ: zeros, ones and NaN, as in a warm-up, hide most dependences.

    Args:
        misses: Whose module is called.
        padder: Pads its calls.
    """

    def __init__(self, misses: Misses, padder: Padder) -> None:
        self._misses = misses
        self._padder = padder
        # By the generation of the module too: a trial beside the calls may end when the module is another one.
        self._found: OrderedDict[tuple[int, Signature], tuple[int, Padder]] = OrderedDict()
        """With the version of the module that it was found of."""
        self._blocks = Blocks(_MOST)
        self._lock = threading.Lock()

    def found(self, target: Signature) -> Padder | None:
        """What crops the answers of a bucket that may be padded to; ``None`` if that is not known."""
        version, padder = self._found.get((self._misses.generation, target), (0, None))
        return padder if version == self._misses.version else None

    def refused(self, target: Signature) -> Cause | None:
        """Why a bucket is not to be tried this time."""
        with self._lock:
            return self._blocks.cause((self._misses.generation, target), self._misses.version)

    def is_refused(self, target: Signature) -> bool:
        """Whether that is so, without counting a call."""
        with self._lock:
            known = self._blocks.look((self._misses.generation, target), self._misses.version)
        return known is not None and known[1] != 0

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._found.clear()
            self._blocks.clear()

    def attempt(
        self,
        target: Signature,
        fit: Fit,
        inputs: Sequence[Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[Any, Padder | Cause]:
        """Answer a call eagerly, as it is, and find out whether it may be padded.

        A module that changes itself, or draws random numbers, is called this once and no more.

        Args:
            target: Signature of the padded call.
            fit: What it is padded to.
            inputs: The tensors of the call as it is.
            args: Its positional arguments.
            kwargs: Its keyword arguments.

        Returns:
            The answer, and either what crops padded ones, or why there must be none.

        Raises:
            Exception: Whatever the module raises for these arguments.
        """
        misses = self._misses
        if not isinstance(misses.recorder, TorchRecorder):
            with graphs_off():
                answer = misses.run(*args, **kwargs)
            return answer, self.tried(target, fit, args, kwargs)
        with misses.gate.shared():
            effects = misses.recorder.observe(args, kwargs, inputs)
            if effects.cause is not None:
                return effects.value, self.refuse(target, effects.cause)
            return effects.value, self.tried(target, fit, args, kwargs, version=effects.version)

    def tried(
        self,
        target: Signature,
        fit: Fit,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        version: int = 0,
        running: Running = nullcontext,
    ) -> Padder | Cause:
        """Find out whether a call that was answered may be padded.

        Args:
            target: Signature of the padded call.
            fit: What it is padded to.
            args: Positional arguments of the call as it is.
            kwargs: Its keyword arguments.
            version: That of the guard when the call was observed to have no effects; ``0`` for an engine.
            running: As for :meth:`~graphcache.capture.torch_recorder.TorchRecorder.again`.

        Returns:
            What crops padded calls, or why there must be none.
        """
        recorder, run = self._misses.recorder, self._misses.run
        try:
            with graphs_off(), torch.no_grad():
                if not isinstance(recorder, TorchRecorder):
                    found = self._tried(run, fit, args, kwargs)
                else:
                    found = self._tried(recorder.again(version, running), fit, args, kwargs)
                    # Calls of other sizes than that which was observed may do what it did not.
                    recorder.check_unchanged(version)
        except Refusal as refusal:
            return self.refuse(target, refusal.cause)
        except Exception as error:
            cause = refusal_of(error, "").cause
            if cause.reason is Reason.CAPTURE_FAILED:
                text = str(error) if isinstance(error, GraphCacheError) else f"{type(error).__name__}: {error}"
                cause = Cause(Reason.PADDING, detail=f"a call of other sizes raised {shown(text)}")
            return self.refuse(target, cause)
        with self._lock:
            self._found[self._misses.generation, target] = version, found
            if len(self._found) > _MOST:
                self._found.popitem(last=False)
        return found

    def refuse(self, target: Signature, cause: Cause) -> Cause:
        """Remember why a bucket is not padded to, which is returned."""
        with self._lock:
            self._blocks.block((self._misses.generation, target), cause, self._misses.version)
        return cause

    def _tried(self, run: Run, fit: Fit, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Padder:
        padder = self._padder
        if padder.buckets.outputs is None:
            padder = padder.with_outputs(observed_outputs(run, args, kwargs, padder))
        for given in (args, kwargs), self._varied(run, args, kwargs):
            smallest = None if given is None else self._smallest(fit, *given)
            for each in (given, smallest):
                if each is not None and (text := dependence(run, *each, padder, gap=padded_gap)) is not None:
                    raise Refusal(Reason.PADDING, detail=text)
        return padder

    def _varied(self, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """The call with values that differ, as those of a warm-up often don't; ``None`` if the module refuses them."""
        _, tensors = describe(args, kwargs)
        made = {id(tensor): varied(tensor) for tensor in tensors}
        new_args, new_kwargs = substitute(args, kwargs, [made[id(tensor)] for tensor in tensors])
        try:
            run(*new_args, **new_kwargs)
        except (Refusal, torch.cuda.OutOfMemoryError):
            raise
        except Exception:
            return None
        return new_args, new_kwargs

    def _smallest(self, fit: Fit, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """The start of a call, of the smallest sizes that go to the same bucket; ``None`` if it has these itself."""
        sizes = {name: _least(self._padder.buckets, name, fit.padded[name]) for name in fit.real}
        if sizes == fit.real:
            return None

        def start(value: Tensor, axes: Any) -> Tensor:
            named: dict[int, InputAxis] = dict(axes)
            return cropped(value, {place: sizes[axis.symbol] for place, axis in named.items()}).clone()

        call = self._padder.exchange(start, args, kwargs)
        module = self._misses.module
        if isinstance(module, EngineModule):
            try:
                module.checked(call[0])
            except InputError:
                # No profile takes it, so no call will have these sizes.
                return None
        return call


def _least(buckets: Buckets, name: str, bucket: int) -> int:
    sizes = buckets.sizes[name]
    place = sizes.index(bucket)
    return sizes[place - 1] + 1 if place else 1
