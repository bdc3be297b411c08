"""What a call does: a mode that sees its operations, what an operator writes, and what the host reads of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import cache, partial, wraps
from types import CodeType, FrameType, FunctionType, MethodType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from graphcache.errors import Reason, Refusal

_OF_GRADIENTS = frozenset({"requires_grad", "is_leaf", "grad", "grad_fn", "_backward_hooks"})
_IN_THE_KEY = frozenset({"requires_grad", "is_leaf", "grad_fn"})
"""What the key tells of every input while gradients are recorded."""
_ASKS = _OF_GRADIENTS | {"storage_offset", "as_strided", "untyped_storage", "_base"}
_ASKS |= {"_is_view", "_version", "is_inference", "is_set_to", "is_shared", "is_pinned", "storage", "typed_storage"}
_ASKS |= {"requires_grad_", "detach_", "share_memory_"}
_OF_DATA = frozenset({"tensor", "as_tensor", "asarray", "new_tensor", "scalar_tensor"})
"""Functions that make a tensor of Python's numbers. They read tensors among them past the dispatcher."""
_OF_STATE = frozenset({"grad", "_version"})
_MASKS = (torch.bool, torch.uint8)
_PUTS = frozenset({"aten::index_put", "aten::index_put_", "aten::_unsafe_index_put", "aten::_index_put_impl_"})

_WAITING = (
    *("aten::_linalg_check_errors", "aten::_linalg_svd", "aten::linalg_matrix_exp", "aten::_nested_from_padded"),
    *("aten::_nested_tensor_from_mask", "aten::_nested_tensor_from_mask_left_aligned"),
)
"""Operators without a tag whose CUDA kernels copy a value to the host and wait for it."""

_RUNNING_STATISTICS = (
    *("aten::native_batch_norm", "aten::cudnn_batch_norm", "aten::miopen_batch_norm", "aten::batch_norm_update_stats"),
    *("aten::batch_norm_gather_stats", "aten::batch_norm_gather_stats_with_counts"),
)
"""Operators that write ``running_mean`` and ``running_var``. Their schemas do not say so, and no version counter moves.
Those with an argument ``training`` write them only where it is true."""

_READS_A_CONDITION = frozenset({"cond", "while_loop", "while_loop_stack_output"})

_CHECKED_ON_THE_HOST = frozenset({"one_hot", "quantile", "nanquantile"})
"""Composite operators that read values to check them on the CPU, and do not on CUDA."""


class HostQuestions(TorchFunctionMode):
    """Notices questions to tensors whose answers no call key holds, and what sets them.

    These are where the memory of an input begins, and whether it requires gradients: who asks may take another path for
    another input. Values that are read past the dispatcher are noticed too. Some operations take another path under
    such a mode: none is active while a call is recorded.
    """

    def __init__(
        self, inputs: Sequence[Tensor] = (), state: Sequence[Tensor] = (), path_here: Callable[[], str] = str
    ) -> None:
        super().__init__()
        # The first question about an input, a view of one, or what outlives the call, and what path_here gave then.
        self.asked = self.path = ""
        self._path_here = path_here
        self._inputs = {storage_of(tensor) for tensor in inputs}
        self._state = {storage_of(tensor) for tensor in state}

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if is_unwatched.get():
            return func(*args, **(kwargs or {}))
        name = access = getattr(func, "__name__", "")
        if access in ("__get__", "__set__"):
            name = getattr(getattr(func, "__self__", None), "__name__", "")
        if not self.asked and _reads_on_the_host(name, args, kwargs or {}):
            self.asked, self.path = name, self._path_here()
        asked_of = storage_of(args[0]) if name in _ASKS and args and isinstance(args[0], Tensor) else None
        # A guard compares where what outlives the call is, and whether it requires gradients; these not.
        of_state = name in _OF_STATE and asked_of in self._state and not _from_torch()
        asks = asked_of is not None and (asked_of in self._inputs or of_state) and not self.asked
        # While gradients are recorded, the key says that no tensor requires them.
        known = _from_torch() or (torch.is_grad_enabled() and access == "__get__" and name in _IN_THE_KEY)
        if asks and not (name in _OF_GRADIENTS and known):
            self.asked, self.path = f"Tensor.{name}", self._path_here()
        return func(*args, **(kwargs or {}))


def _reads_on_the_host(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a function reads tensors on the host and shows no operation that does."""
    if name == "tensor_split":
        return any(isinstance(each, Tensor) for each in (*args[1:], *kwargs.values()))
    if name in ("__reduce_ex__", "__deepcopy__"):
        # A copy, through the memory. On a device it is one that is captured, or the capture fails.
        return isinstance(args[0], Tensor) and not args[0].is_cuda
    if name in _OF_DATA:
        return any(isinstance(each, (list, tuple)) and tensors_in(each) for each in (*args, *kwargs.values()))
    return False


def _from_torch() -> bool:
    """Whether PyTorch's own code asks: without gradients, it computes the same for any ``requires_grad``."""
    # Skip this package's frames between the code and the mode.
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__", "").startswith("graphcache."):
        frame = frame.f_back
    return frame is not None and frame.f_globals.get("__name__", "").startswith("torch.")


is_unwatched: ContextVar[bool] = ContextVar("graphcache_unwatched", default=False)
"""Set while a watched module runs code of this package: :class:`HostQuestions` notices nothing then."""


def refuse_by_tag(func: Any, args: Sequence[Any], kwargs: dict[str, Any] | None = None) -> None:
    """Raise a :class:`Refusal` for an operation that no CUDA capture can hold."""
    if is_higher_order(func):
        if func._name in _READS_A_CONDITION:
            raise Refusal(Reason.HOST_READ, str(func), "the host reads the condition")
        return
    name = func._schema.name
    # A histogram without bounds looks for the least and the greatest value.
    unbounded = name == "aten::histc" and len(args) < 4
    if torch.Tag.data_dependent_output in func.tags or name in _WAITING or unbounded:
        raise Refusal(Reason.HOST_READ, str(func))
    if torch.Tag.dynamic_output_shape in func.tags:
        # Of some, the shape depends on no value here.
        if func is torch.ops.aten.index.Tensor:
            is_fixed = not _has_mask(args[1])
        elif func is torch.ops.aten.repeat_interleave.Tensor:
            is_fixed = (kwargs or {}).get("output_size") is not None
        else:
            is_fixed = is_checked_on_the_host(func, args, kwargs or {})
        if not is_fixed:
            raise Refusal(Reason.DATA_DEPENDENT, str(func))
    if puts_by_mask(func, args) and args[2].numel() != 1:
        raise Refusal(Reason.DATA_DEPENDENT, str(func), "how many elements are written depends on the mask")


def is_higher_order(func: Any) -> bool:
    """Whether an operator takes functions, as ``torch.cond`` and ``flex_attention`` do: those have no tags."""
    return isinstance(func, torch._ops.HigherOrderOperator)


def puts_by_mask(func: Any, args: Sequence[Any]) -> bool:
    """Whether an operator writes where a mask says. CUDA reads the mask for that, unless a Python number is written."""
    return func._schema.name in _PUTS and _has_mask(args[1])


def _has_mask(indices: Any) -> bool:
    return any(index.dtype in _MASKS for index in tensors_in(indices))


def is_checked_on_the_host(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether an operator (or PyTorch's function) reads values only to check them on the CPU: CUDA captures it."""
    name = func._opname if isinstance(func, torch._ops.OpOverload) else getattr(func, "__name__", "")
    if name == "one_hot":
        # Without a number of classes it reads the greatest value for the shape of its answer.
        classes = args[1] if len(args) > 1 else kwargs.get("num_classes", -1)
        return bool(classes != -1)
    return name in _CHECKED_ON_THE_HOST


@cache
def _is_composite(func: Any) -> bool:
    if not isinstance(func, torch._ops.OpOverload):
        return False
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    name: str = func.name()  # type: ignore[no-untyped-call]
    return bool(has_kernel(name, torch._C.DispatchKey.CompositeImplicitAutograd))


def written(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that an operation writes into, by its schema or, where that is wrong, by name."""
    found: list[Tensor] = []
    for index, name in _written_arguments(func):
        value = args[index] if index < len(args) else kwargs.get(name)
        found += tensors_in(value)
    if found and func._schema.name in _RUNNING_STATISTICS:
        names = [argument.name for argument in func._schema.arguments]
        if "training" in names and not dict(zip(names, args, strict=False), **kwargs).get("training"):
            return []
    return found


@cache
def _written_arguments(func: Any) -> tuple[tuple[int, str], ...]:
    """Places and names of the arguments that an operator may write into."""
    schema = getattr(func, "_schema", None)
    if schema is None:
        return ()
    named = [(index, argument.name) for index, argument in enumerate(schema.arguments)]
    if schema.is_mutable:
        infos = [argument.alias_info for argument in schema.arguments]
        return tuple(each for each, info in zip(named, infos, strict=True) if info is not None and info.is_write)
    if schema.name in _RUNNING_STATISTICS:
        return tuple(each for each in named if each[1] in ("running_mean", "running_var"))
    # PyTorch's convention for writing the first argument, which c10d's collectives follow without saying so.
    if schema.name.endswith("_") and not schema.name.endswith("__"):
        return tuple(named[:1])
    return ()


def flatten(value: Any) -> list[Any]:
    """The leaves of nested lists, tuples and dictionaries."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in flatten(item)]
    return [value]


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors among the arguments or results of an operation."""
    return [leaf for leaf in flatten(value) if isinstance(leaf, Tensor)]


def storage_of(tensor: Tensor) -> int:
    """Identifies the memory of a tensor, for as long as the tensor lives; 0 for a tensor without any."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):
        return 0


_eval_frame: Any = torch._C._dynamo.eval_frame
_CAN_SKIP = all(hasattr(_eval_frame, n) for n in ("set_code_exec_strategy", "_FrameExecStrategy", "_FrameAction"))
_F = TypeVar("_F", bound=Callable[..., Any])


def skipped_by_dynamo(function: _F) -> _F:
    """Have Dynamo compile neither a function nor what it calls, where it runs within compiled code."""
    code = getattr(function, "__code__", None)
    if not _CAN_SKIP or not isinstance(code, CodeType):
        return cast("_F", torch._disable_dynamo(function, recursive=True))  # type: ignore[attr-defined]
    skip = _eval_frame._FrameAction.SKIP
    _eval_frame.set_code_exec_strategy(code, _eval_frame._FrameExecStrategy(skip, skip))
    return function


_FUNCTIONS = (FunctionType, MethodType, partial, nn.Module)


class DispatchMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A ``TorchDispatchMode`` that Dynamo does not compile, and that does not keep Dynamo from compiling.

    PyTorch wraps any other mode in ``torch._dynamo.disable``, which imports ``torch._dynamo`` and sympy (1 to 4 s), and
    under any other mode Dynamo compiles nothing: ``fullgraph=True``, ``torch.cond`` and ``flex_attention`` raise, for
    the rest of the process. Of a function that Inductor compiled, only calls of library kernels are seen.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def operation(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation that is not made of others."""
        raise NotImplementedError

    @skipped_by_dynamo
    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not _is_composite(func) or is_checked_on_the_host(func, args, kwargs):
            return self.operation(func, args, kwargs)
        # Composites reach a mode whole under inference_mode: nothing shows what batch_norm writes or dropout draws.
        with self:
            # As eager execution does it. func.decompose() prefers a decomposition in Python, which may give other bits.
            return func._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *args, **kwargs)

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Whether Dynamo compiles, and finds what it has compiled, as if this mode were not there."""
        return True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __init_subclass__(cls) -> None:
        """Nothing is to be kept from Dynamo here: PyTorch calls what the base class has."""

    def higher_order(self, func: HigherOrderOperator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a higher-order operator, such as ``torch.ops.higher_order.cond``, with its functions under this mode."""

        def under(function: Callable[..., Any]) -> Callable[..., Any]:
            @wraps(function, updated=())
            def inside(*args: Any, **kwargs: Any) -> Any:
                with self:
                    return function(*args, **kwargs)

            return inside

        # Operators of this base class refuse anything but a graph module.
        if not any(each.__name__ == "BaseHOP" for each in type(func).__mro__):
            args, kwargs = pytree.tree_map_only(_FUNCTIONS, under, (args, kwargs))
        return func(*args, **kwargs)
