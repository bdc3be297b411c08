"""One model behind graphs that answers lists of requests. It knows no transport: Ray's replicas and threads use it."""

from __future__ import annotations

import inspect
import itertools
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from graphcache.cache.buckets import Buckets
from graphcache.cache.independence import dependence, observed_outputs
from graphcache.config import GraphConfig
from graphcache.errors import ClosedError, ConfigError, InputDtypeError, InputRankError, ProfileRangeError, shown
from graphcache.events import log
from graphcache.graphs.verify import difference, tolerance_of
from graphcache.modules.engine import EngineModule
from graphcache.modules.engine_buckets import engine_buckets
from graphcache.modules.examples import Call, varied
from graphcache.modules.info import CacheInfo
from graphcache.modules.wrapping import wrapped
from graphcache.serving.backend import ModelSpec, TensorSpec
from graphcache.serving.batching import Batcher, Counts, Kind, Request, Tensors, answer_all, row_buckets
from graphcache.serving.sources import module_of, named

MOST_ROWS = 32
"""Rows that are put together where nobody said how many."""
MOST_KINDS = 8
"""Kinds of requests whose graphs are kept where nobody said how many."""


@dataclass(frozen=True)
class Settings:
    """How a model is served; travels to every replica.

    Args:
        source: As :func:`~graphcache.serving.sources.module_of` takes it.
        name: Under which it is served; that of the source if empty.
        into: For a package of a model: what makes the model.
        device: Where a module that a function made goes.
        buckets: Sizes of the rows, such as ``[1, 8, 32]``; or as the ``buckets`` option has them, with axis 0 of every
            input. ``None`` means powers of two.
        prepare: Requests, one for each kind to capture before serving: a mapping from each input to a tensor, or to a
            shape for an engine. Rows do not matter: every size of the rows is captured.
        config: Options of :class:`~graphcache.GraphConfig`, but ``buckets``.
        max_batch_size: Rows that are put together at most.
        max_kinds: Kinds of requests whose graphs one replica keeps.
    """

    source: Any
    name: str = ""
    into: Any = None
    device: str | None = None
    buckets: Any = None
    prepare: tuple[Mapping[str, Any], ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    max_batch_size: int = MOST_ROWS
    max_kinds: int = MOST_KINDS

    def __post_init__(self) -> None:
        for option in ("max_batch_size", "max_kinds"):
            value = getattr(self, option)
            if type(value) is not int or value < 1:
                raise ConfigError(f"{option}={shown(value)}: expected a whole number, 1 or more")
        if not isinstance(self.prepare, (list, tuple)) or not all(isinstance(each, Mapping) for each in self.prepare):
            raise ConfigError(f"prepare={shown(self.prepare)}: expected requests, each a mapping from input to shape")
        if "buckets" in self.config:
            raise ConfigError("config['buckets']: requests are padded before they are put together; expected buckets=")
        # What is wrong with an option is told before a process is started for it.
        GraphConfig.of(self.config)
        object.__setattr__(self, "prepare", tuple(self.prepare))
        object.__setattr__(self, "name", self.name or named(self.source))


class Runner:
    """A model, its graphs and its batches. Calls from several threads follow one another.

    Every kind of requests is tried before its first batch: where margins or neighbours would change an answer, its
    requests are run one by one, as they are.

    Args:
        settings: How it is served.

    Raises:
        ConfigError: Naming the option.
        GraphCacheError: As :func:`~graphcache.serving.sources.module_of`.

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
        self.module = module.eval() if not isinstance(module, EngineModule) else module
        self._engine = module if isinstance(module, EngineModule) else None
        self.device = _device_of(module)
        self._arguments: Any = (
            self._engine.input_binding_names if self._engine is not None else inspect.signature(module.forward)
        )
        self.batcher = Batcher(self._bucketed(settings, saved), self._arguments)
        self.fast = wrapped(module, self._options(settings, saved))
        self.counts = Counts()
        self.held: dict[Kind, str] = {}
        """Kinds that were tried -> why their requests are run one by one; empty for those that are put together."""
        self._lock = threading.Lock()
        self._closed = False
        try:
            examples = [self._example(each) for each in settings.prepare] or self._usual_examples()
            for example in examples:
                self.hold(self.batcher.request(example).kind)
            self.spec = self._described(examples)
        except BaseException:
            self.fast.close()
            raise

    def hold(self, kind: Kind) -> str:
        """Capture every size of a kind of requests, and try whether they may be put together.

        Returns:
            Why they may not; empty if they may.

        Raises:
            Exception: Whatever the module raises for them.
        """
        with self._lock, _serving():
            self._check_open()
            if kind not in self.held:
                self._hold(kind)
            return self.held[kind]

    def answer(self, requests: Sequence[Any]) -> list[dict[str, Tensor] | Exception]:
        """The outputs of each request, in host memory and its own; or what was wrong with it.

        Args:
            requests: Tensors by name, in host memory; they are read only.

        Raises:
            ClosedError: After :meth:`close`.
        """
        with self._lock, _serving():
            self._check_open()
            start = time.perf_counter()
            answers = answer_all(self.batcher, self._run, requests, self.counts, alone=self._alone)
            self.counts.seconds += time.perf_counter() - start
            return answers

    def check(self, inputs: Any) -> Request:
        """What a request is, without answering it.

        Raises:
            InputError: One of its kinds, if it cannot be answered.
        """
        request = self.batcher.request(inputs)
        if self._engine is None:
            return request
        for binding in self._engine.engine.inputs:
            value = inputs.get(binding.name)
            if value is None:
                continue
            label = f"input {binding.name!r} of {self.name}"
            if value.dtype is not binding.dtype:
                raise InputDtypeError(f"{label} is {value.dtype}; the engine takes {binding.dtype}")
            if value.dim() != len(binding.shape):
                raise InputRankError(
                    f"{label} has {value.dim()} dimensions {tuple(value.shape)}; the engine takes {binding.shape}"
                )
            for axis, (got, built) in enumerate(zip(value.shape, binding.shape, strict=True)):
                if built >= 0 and got != built:
                    raise ProfileRangeError(
                        f"{label} has the shape {tuple(value.shape)}; axis {axis} of the engine has the size {built}"
                    )
        return request

    def info(self) -> CacheInfo:
        """Hits, captures and eager calls of the graphs."""
        return self.fast.cache_info()

    def close(self) -> None:
        """Give back graphs and engine, after the calls that are under way. Again, it does nothing."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self.fast.close()
                if self._engine is not None:
                    self._engine.close()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"{self.name} is closed; load it again")

    def _run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self._called(self.fast, inputs)

    def _called(self, module: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        answer = module(**{name: tensor.to(self.device) for name, tensor in inputs.items()})
        return {name: tensor.cpu() for name, tensor in self._outputs(answer)}

    def _outputs(self, answer: Any) -> Iterator[tuple[str, Tensor]]:
        if isinstance(answer, Mapping):
            named_ = list(answer.items())
        else:
            each = list(answer) if isinstance(answer, (tuple, list)) else [answer]
            names = self._engine.output_binding_names if self._engine is not None else ()
            named_ = [(names[at] if at < len(names) else f"output_{at}", value) for at, value in enumerate(each)]
        for name, value in named_:
            if not isinstance(value, Tensor):
                raise ConfigError(
                    f"{self.name} answers with {shown(value)} as {name!r}; expected tensors, by name or in a tuple"
                )
            yield str(name), value

    def _alone(self, request: Request) -> Tensors | None:
        """The answer of a request that goes with no other."""
        self.check(request.inputs)
        if request.kind in self.held and not self.held[request.kind]:
            return None
        if request.kind not in self.held:
            if not self._may_hold(request.kind):
                return self._called(self.fast, request.inputs)
            self._hold(request.kind)
            if not self.held[request.kind]:
                return None
        return self._called(self.fast, request.inputs)

    def _may_hold(self, kind: Kind) -> bool:
        """Whether a kind differs from a known one by buckets alone; there is no end of those that clients think of."""
        declared = {(name, dtype, len(shape)) for known in self.held for name, dtype, shape in known}
        if not all((name, dtype, len(shape)) in declared for name, dtype, shape in kind):
            return False
        free = self.batcher.buckets
        for name, _, shape in kind:
            axes = {axis.axis if axis.axis >= 0 else axis.axis + len(shape) + 1 for axis in free.inputs[name]}
            sizes = {
                tuple(size for at, size in enumerate(there, 1) if at not in axes)
                for known in self.held
                for other, _, there in known
                if other == name
            }
            if tuple(size for at, size in enumerate(shape, 1) if at not in axes) not in sizes:
                return False
        return True

    def _hold(self, kind: Kind) -> None:
        batcher = self.batcher
        example = self._valued(kind)
        self._check_alone(example)
        why = self._tried(kind, example)
        if why:
            log.warning("%s: requests are run one by one, %s", self.name, why)
        else:
            calls = [
                Call((), {name: tensor[:rows].to(self.device) for name, tensor in example.items()})
                for rows in batcher.sizes
            ]
            self.fast.prepare(*calls, progress=False)
        # The oldest go with their graphs, which are the least recently used.
        self.held[kind] = why
        while len(self.held) > max(self.settings.max_kinds, len(self.settings.prepare)):
            self.held.pop(next(iter(self.held)))

    def _check_alone(self, example: Tensors) -> None:
        """Let the module raise for what it does not take, before anything is captured."""
        self._called(self.module, {name: tensor[:1] for name, tensor in example.items()})

    def _tried(self, kind: Kind, example: Tensors) -> str:
        """Why requests of a kind must not be padded or put together; empty if nothing speaks against it."""
        batcher = self.batcher
        on_device = {name: tensor.to(self.device) for name, tensor in example.items()}
        try:
            if batcher.buckets.outputs is None:
                batcher.with_outputs(observed_outputs(self.module, (), on_device, batcher.padder))
            text = dependence(self.module, (), on_device, batcher.padder, difference=difference, tolerance=tolerance_of)
            if text is not None:
                return text
            return self._neighbours(example)
        except Exception as error:
            return f"a call of other sizes raised {type(error).__name__}: {shown(str(error))}"

    def _neighbours(self, example: Tensors) -> str:
        """Whether a request is answered behind others as it is alone."""
        if self.batcher.largest < 2:
            return ""
        rows = self.batcher.largest
        parts = [(0, rows - 1), (rows - 1, rows)]
        requests = [
            self.batcher.request({name: tensor[start:end].clone() for name, tensor in example.items()})
            for start, end in parts
        ]
        [batch] = self.batcher.batches(requests)
        for request, got in zip(requests, batch.split(self._called(self.module, batch.inputs())), strict=True):
            wanted = self._called(self.module, request.inputs)
            for name, tensor in wanted.items():
                same_shape = got[name].shape == tensor.shape
                gap = difference(got[name], tensor) if same_shape else float("inf")
                if not gap <= tolerance_of(tensor):
                    return f"output {name!r} of a request depends on the requests beside it (relative {gap:.3g})"
        return ""

    def _bucketed(self, settings: Settings, saved: GraphConfig | None) -> Buckets:
        given = settings.buckets
        if given is None and saved is not None and saved.buckets is not None:
            given = saved.buckets
        usual = given is None
        if usual or isinstance(given, (list, tuple, range, str)):
            given = row_buckets("powers_of_two" if usual else given, self._inputs())
        buckets = Buckets.of(given)
        if self._engine is not None:
            buckets = engine_buckets(buckets, self._engine)
        symbol = Batcher(buckets, self._arguments).symbol
        sizes = tuple(size for size in buckets.sizes[symbol] if size <= settings.max_batch_size)
        if not sizes:
            raise ConfigError(
                f"max_batch_size={settings.max_batch_size}: the smallest size of the rows is "
                f"{buckets.sizes[symbol][0]}; expected at least that"
            )
        return buckets.with_sizes({symbol: sizes})

    def _inputs(self) -> list[str]:
        if self._engine is not None:
            return list(self._engine.input_binding_names)
        required = [
            each.name
            for each in self._arguments.parameters.values()
            if each.default is inspect.Parameter.empty
            and each.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        ]
        if not required:
            raise ConfigError(
                f"{self.name}: forward{self._arguments} names no input; expected buckets={{'name': {{0: [1, 8]}}}}"
            )
        return required

    def _options(self, settings: Settings, saved: GraphConfig | None) -> GraphConfig:
        options = dict(settings.config)
        config = GraphConfig.of(options) if saved is None else replace(saved, buckets=None, **options)
        if "capture" not in options:
            config = replace(config, capture="prepared")
        if "max_graphs" not in options:
            kinds = max(settings.max_kinds, len(settings.prepare))
            config = replace(config, max_graphs=max(config.max_graphs, kinds * len(self.batcher.sizes)))
        return config

    def _example(self, given: Mapping[str, Any]) -> dict[str, Tensor]:
        bindings = {} if self._engine is None else {each.name: each for each in self._engine.engine.inputs}
        made = {}
        for name, value in given.items():
            if not isinstance(value, Tensor):
                shape_ok = isinstance(value, (tuple, list)) and all(type(size) is int and size >= 0 for size in value)
                if not shape_ok or not value:
                    raise ConfigError(f"prepare: {name!r} is {shown(value)}; expected a tensor, or a shape with rows")
                dtype = bindings[name].dtype if name in bindings else torch.float32
                value = torch.zeros([1, *value[1:]], dtype=dtype)
            elif value.dim() > 0:
                value = value.detach()[:1].cpu()
            made[str(name)] = value
        for name, binding in bindings.items():
            if name not in made and name not in self.batcher.buckets.masks and -1 not in binding.shape[1:]:
                made[name] = torch.zeros([1, *binding.shape[1:]], dtype=binding.dtype)
        return made

    def _usual_examples(self) -> list[dict[str, Tensor]]:
        """Of an engine, every combination of the buckets, as many as are kept; of a module nothing can be told."""
        if self._engine is None:
            raise ConfigError(
                f"{self.name}: what a module takes cannot be told; expected prepare=[{{'x': torch.zeros(1, 64)}}], or "
                f"--prepare x:1x64"
            )
        buckets = self.batcher.buckets
        others = {name: sizes for name, sizes in buckets.sizes.items() if name != self.batcher.symbol}
        found = []
        for chosen in itertools.islice(itertools.product(*others.values()), self.settings.max_kinds):
            sizes = dict(zip(others, chosen, strict=True))
            example = {}
            for binding in self._engine.engine.inputs:
                shape = list(binding.shape)
                axes = buckets.inputs.get(binding.name, ())
                for axis, place in zip(axes, buckets.places(binding.name, len(shape)) if axes else (), strict=True):
                    shape[place] = sizes.get(axis.symbol, 1)
                if -1 in shape:
                    raise ConfigError(
                        f"{self.name} leaves open axis {shape.index(-1)} of {binding.name!r}; expected buckets for it, "
                        f"or prepare=[{{{binding.name!r}: {tuple(max(size, 1) for size in shape)}}}]"
                    )
                example[binding.name] = torch.zeros(shape, dtype=binding.dtype)
            found.append(example)
        return found

    def _valued(self, kind: Kind) -> dict[str, Tensor]:
        """As many rows as go together, with values that differ; masks say that all of it is real.

        Integers are 0 or 1, which any table can look up, and 1 at the start of each axis: they may be a mask by another
        name, and one that hides everything has no answer.
        """
        generator = torch.Generator().manual_seed(0)
        # Tensors of inference mode could not be filled outside of it.
        with torch.inference_mode(False), torch.no_grad():
            inputs = self.batcher.example(kind, self.batcher.largest)
            for name, tensor in inputs.items():
                if name in self.batcher.buckets.masks:
                    tensor.fill_(1)
                elif not tensor.is_floating_point() and not tensor.is_complex():
                    tensor.copy_(torch.randint(2, tensor.shape, generator=generator))
                    tensor[:, *[0] * (tensor.dim() - 1)] = 1
                else:
                    varied((), {name: tensor})
        return inputs

    def _described(self, examples: Sequence[Tensors]) -> ModelSpec:
        with self._lock, _serving():
            answers = [
                self._called(self.module, self.batcher.batches([self.batcher.request(each)])[0].inputs())
                for each in examples
            ]
        inputs = _specs(examples, {name: self.batcher.buckets.inputs.get(name, ()) for name in examples[0]})
        outputs = [
            TensorSpec(each.name, each.dtype, _opened(each.shape, [0, *self.batcher.outputs.get(place, {})]))
            for place, each in enumerate(_specs(answers, {}))
        ]
        platform = "tensorrt" if self._engine is not None else "pytorch"
        return ModelSpec(self.name, ("1",), inputs, tuple(outputs), platform)


def _specs(examples: Sequence[Tensors], axes: Mapping[str, Any]) -> tuple[TensorSpec, ...]:
    found = []
    for name, first in examples[0].items():
        shape = list(first.shape)
        for other in examples[1:]:
            if name in other and other[name].dim() == len(shape):
                shape = [one if one == two else -1 for one, two in zip(shape, other[name].shape, strict=True)]
        opened = _opened(tuple(shape), [axis.axis for axis in axes.get(name, ())])
        found.append(TensorSpec(name, str(first.dtype).removeprefix("torch."), opened))
    return tuple(found)


def _opened(shape: tuple[int, ...], axes: Sequence[int]) -> tuple[int, ...]:
    open_ = {axis % len(shape) for axis in axes} if shape else set()
    return tuple(-1 if at in open_ else size for at, size in enumerate(shape))


@contextmanager
def _serving() -> Iterator[None]:
    """The modes under which everything here is prepared and answered: a graph answers one of them alone."""
    with torch.inference_mode():
        yield


def _device_of(module: nn.Module) -> torch.device:
    if isinstance(module, EngineModule):
        return module.device
    tensors = itertools.chain(module.parameters(), module.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))
