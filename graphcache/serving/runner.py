"""One model behind graphs that answers lists of requests. It knows no transport: Ray's replicas and threads use it."""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from graphcache.buckets.padder import engine_buckets
from graphcache.buckets.spec import Buckets
from graphcache.config import GraphConfig
from graphcache.errors import ClosedError, ConfigError, InputDtypeError, InputRankError, ProfileRangeError, shown
from graphcache.events import log
from graphcache.modules.engine import EngineModule
from graphcache.modules.prepare import Call
from graphcache.modules.transparent import controls
from graphcache.modules.wrapped import CacheInfo, device_of
from graphcache.modules.wrapping import wrapped
from graphcache.serving.backend import ModelSpec
from graphcache.serving.batching import Batcher, Counts, Request, Tensors, answer_all
from graphcache.serving.examples import (
    given_example,
    input_names,
    refusal,
    specs_of,
    usual_examples,
    valued,
    with_rows,
)
from graphcache.serving.kinds import Kind
from graphcache.serving.settings import Settings
from graphcache.serving.sources import module_of


class Runner:
    """A model, its graphs and its batches. Calls from several threads follow one another.

    Every kind of requests is tried before its first batch: where margins or neighbours would change an answer, its
    requests are run one by one, as they are.

    Args:
        settings: How the model is served.

    Raises:
        ConfigError: Naming the option.
        GraphCacheError: As :func:`~graphcache.serving.sources.module_of`.
        Exception: Whatever the module raises for what is to be prepared.

    Example:
        >>> runner = Runner(Settings(nn.ReLU, buckets=[1, 4], prepare=({"input": torch.zeros(1, 2)},)))
        >>> runner.answer([{"input": torch.full((1, 2), -1.0)}, {"input": torch.full((2, 2), 3.0)}])
        [{'output_0': tensor([[0., 0.]])}, {'output_0': tensor([[3., 3.],
                [3., 3.]])}]
        >>> runner.counts.batches
        Counter({4: 1})
        >>> runner.close()
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.name = settings.name
        module, saved = module_of(settings.source, into=settings.into, device=settings.device)
        self._engine = module if isinstance(module, EngineModule) else None
        self.module = module if self._engine is not None else module.eval()
        given = settings.device if self._engine is None else None
        self.device = device_of(module) if given is None else torch.device(given)
        arguments: Any = inspect.signature(module.forward) if self._engine is None else self._engine.input_binding_names
        self.batcher = Batcher(self._buckets(settings, saved, arguments), arguments)
        self.counts = Counts()
        self.held: dict[Kind, str] = {}
        """Kinds that were tried -> why their requests are run one by one; empty for those that are put together."""
        self._lock = threading.Lock()
        self._closed = False
        self._stream = None
        if self.device.type == "cuda":
            # Of its own: what runs on the legacy stream waits for all others, and they for it.
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        buckets = self.batcher.buckets
        examples = [given_example(each, self._engine, buckets) for each in settings.prepare]
        examples = examples or usual_examples(self.name, self._engine, self.batcher, settings.max_kinds)
        requests = [self.batcher.request(each) for each in examples]
        axes = {str(name): [axis.axis for axis in each] for name, each in buckets.inputs.items()}
        self.spec = ModelSpec(
            self.name, ("1",), specs_of(examples, axes), (), "pytorch" if self._engine is None else "tensorrt"
        )
        self._declared = {request.kind for request in requests}
        self.fast = wrapped(module, self._options(settings, saved))
        try:
            for request in requests:
                self.hold(request.kind)
            with self._serving():
                answers = [self._called(self.module, self.batcher.batches([each])[0].inputs()) for each in requests]
        except BaseException:
            self.close()
            raise
        open_ = {name: [0, *self.batcher.outputs.get(place, {})] for place, name in enumerate(answers[0])}
        self.spec = replace(self.spec, outputs=specs_of(answers, open_))

    def hold(self, kind: Kind) -> str:
        """Capture every size of a kind of requests, and try whether they may be put together.

        Returns:
            Why they may not; empty if they may.

        Raises:
            ClosedError: After :meth:`close`.
            Exception: Whatever the module raises for them.
        """
        with self._lock, self._serving():
            self._check_open()
            return self._held(kind)

    def check(self, inputs: Any) -> Request:
        """What a request is, without answering it.

        Raises:
            InputError: One of its kinds, if the model does not take it.
        """
        request = self.batcher.request(inputs)
        self._check_spec(request.inputs)
        return request

    def answer(self, requests: Sequence[Any]) -> list[dict[str, Tensor] | Exception]:
        """The outputs of each request, in host memory and its own; or what was wrong with it.

        Args:
            requests: Tensors by name, in host memory; they are read only.

        Raises:
            ClosedError: After :meth:`close`.
        """
        with self._lock, self._serving():
            self._check_open()
            start = time.perf_counter()
            answers = answer_all(self.batcher, self._run, requests, self.counts, alone=self._alone)
            self.counts.seconds += time.perf_counter() - start
            return answers

    def info(self) -> CacheInfo:
        """Hits, captures and eager calls of the graphs."""
        found: CacheInfo = controls(self.fast).cache_info()
        return found

    def close(self) -> None:
        """Give back graphs and engine, after the calls that are under way. Again, it does nothing."""
        with self._lock:
            if not self._closed:
                self._closed = True
                controls(self.fast).close()
                if self._engine is not None:
                    self._engine.close()

    @contextmanager
    def _serving(self) -> Iterator[None]:
        """The modes and the stream under which everything is prepared and answered: a graph is of one of them."""
        # Nothing happens for a stream that is None.
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            yield

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"{self.name} is closed; load it again")

    def _check_spec(self, inputs: Tensors) -> None:
        for spec in self.spec.inputs:
            value = inputs.get(spec.name)
            if value is None:
                continue
            label = f"input {spec.name!r} of {self.name}"
            if str(value.dtype) != f"torch.{spec.dtype}":
                raise InputDtypeError(f"{label} is {value.dtype}; the model takes torch.{spec.dtype}")
            if value.dim() != len(spec.shape):
                raise InputRankError(
                    f"{label} has {value.dim()} dimensions {tuple(value.shape)}; the model takes {spec.shape}"
                )
            if not all(there in (-1, size) for there, size in zip(spec.shape, value.shape, strict=True)):
                raise ProfileRangeError(f"{label} has the shape {tuple(value.shape)}; the model takes {spec.shape}")

    def _alone(self, request: Request) -> Tensors | None:
        """The answer of a request that goes with no other; ``None`` for one that may."""
        self._check_spec(request.inputs)
        if (self._may_hold(request.kind)) and not self._held(request.kind):
            return None
        return self._called(self.fast, request.inputs)

    def _may_hold(self, kind: Kind) -> bool:
        """Whether a kind is one of those that were declared, by example or by buckets: clients can think of any."""
        if kind in self._declared:
            return True
        open_ = {(spec.name, at) for spec in self.spec.inputs for at, size in enumerate(spec.shape) if size < 0}
        bucketed = {
            (name, place) for name, _, shape in kind for place in self.batcher.buckets.places(name, len(shape) + 1)
        }
        return open_ <= bucketed

    def _held(self, kind: Kind) -> str:
        why = self.held.pop(kind, None)
        # What was used last stays longest.
        self.held[kind] = self._hold(kind) if why is None else why
        if len(self.held) > self._most_kinds:
            self.held.pop(next(iter(self.held)))
        return self.held[kind]

    def _hold(self, kind: Kind) -> str:
        example = valued(self.batcher, kind)
        # For the module to raise for what it does not take, before anything is captured.
        self._called(self.module, {name: tensor[:1] for name, tensor in example.items()})
        why = refusal(self.batcher, self.module, lambda given: self._called(self.module, given), example, self.device)
        if why:
            log.warning("%s: requests are run one by one, %s", self.name, why)
            return why
        calls = [
            Call((), {name: tensor[:rows].to(self.device) for name, tensor in example.items()})
            for rows in self.batcher.sizes
        ]
        controls(self.fast).prepare(*calls, progress=False)
        return ""

    @property
    def _most_kinds(self) -> int:
        return max(self.settings.max_kinds, len(self._declared))

    def _run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self._called(self.fast, inputs)

    def _called(self, module: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # Always in one order, that of kinds, since a signature has one.
        answer = module(**{name: inputs[name].to(self.device) for name in sorted(inputs)})
        return {name: tensor.cpu() for name, tensor in self._outputs(answer)}

    def _outputs(self, answer: Any) -> Iterator[tuple[str, Tensor]]:
        if isinstance(answer, Mapping):
            pairs = [(str(name), value) for name, value in answer.items()]
        else:
            each = answer if isinstance(answer, (tuple, list)) else [answer]
            names = [f"output_{place}" for place in range(len(each))]
            pairs = list(zip(names if self._engine is None else self._engine.output_binding_names, each, strict=True))
        for name, value in pairs:
            if not isinstance(value, Tensor):
                raise ConfigError(
                    f"{self.name} answers with {shown(value)} as {name!r}; expected tensors, by name or in a tuple"
                )
            yield name, value

    def _buckets(self, settings: Settings, saved: GraphConfig | None, arguments: Any) -> Buckets:
        given = settings.buckets
        if given is None and saved is not None:
            given = saved.buckets
        rows = "powers_of_two" if settings.rows is None else settings.rows
        if isinstance(given, (list, tuple, range, str)):
            given, rows = None, given
        if not isinstance(given, Buckets):
            given = with_rows(given or {}, rows, input_names(self.name, arguments))
        buckets = Buckets.of(given)
        if self._engine is not None:
            buckets = engine_buckets(buckets, self._engine)
        symbol = Batcher(buckets, arguments).symbol
        sizes = tuple(size for size in buckets.sizes[symbol] if size <= settings.max_batch_size)
        if not sizes:
            raise ConfigError(
                f"max_batch_size={settings.max_batch_size}: the smallest size of the rows is "
                f"{buckets.sizes[symbol][0]}; expected at least that"
            )
        return buckets.with_sizes({symbol: sizes})

    def _options(self, settings: Settings, saved: GraphConfig | None) -> GraphConfig:
        options = dict(settings.config)
        config = GraphConfig.of(options) if saved is None else replace(saved, buckets=None, **options)
        if "capture" not in options:
            config = replace(config, capture="prepared")
        if "max_graphs" not in options:
            config = replace(config, max_graphs=max(config.max_graphs, self._most_kinds * len(self.batcher.sizes)))
        return config
