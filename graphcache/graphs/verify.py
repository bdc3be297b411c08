"""A new graph's replay must equal the eager answer, or the graph is never used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.testing._comparison import default_tolerances

from graphcache.errors import Reason, Refusal
from graphcache.graphs.buffers import packed, static_copy

SPREADS = 4
"""A replay may be so many times further from eager execution than three eager runs are from each other, which show a
part of the range that sums in another order reach."""

UNORDERED = 16
"""Eager runs of one call may differ by so many default tolerances per element: sums in another order stay below. What
differs more is taken for random numbers or a clock, which a graph would freeze."""

PADDED = 8
"""A padded call may differ by so many default tolerances: its kernels split their sums in another way. A layer adds
about one step of the dtype, of which float32's tolerance has 11, the others' one or two."""

_STEPS = 7
"""After so many elements, :func:`perturb` adds the same again: odd, so that rows of even length differ too."""


class Round(NamedTuple):
    """Inputs to verify a graph with, what messages call them, and the eager outputs for them."""

    name: str
    inputs: Sequence[Tensor]
    expected: Sequence[Tensor]


Eager = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""Runs the call eagerly on other inputs; the outputs are copies."""


def rounds_of(inputs: Sequence[Tensor], expected: Sequence[Tensor], again: Eager, any_values: bool) -> Iterator[Round]:
    """The inputs of a capture and two other sets; unless the call takes ``any_values``, no set that it raises for."""
    yield Round("the inputs of the capture", inputs, expected)
    for name, negative in ("inputs of other values", False), ("inputs of the other sign", True):
        others = perturb(inputs, negative=negative)
        try:
            wanted = again(others)
        except Exception as error:
            if any_values or isinstance(error, (Refusal, torch.cuda.OutOfMemoryError)):
                raise
            continue
        yield Round(name, others, wanted)


class Verifiable(Protocol):
    """As much of a :class:`~graphcache.graphs.graph.Graph` as is verified."""

    def replay(self, inputs: Sequence[Tensor], out: list[Tensor]) -> list[Tensor]:
        """Answer inputs of the captured layouts in ``out``."""

    def poison(self, out: Sequence[Tensor]) -> None:
        """Overwrite static inputs and outputs, and ``out``."""

    def close(self) -> None:
        """Release everything."""


def verify(graph: Verifiable, rounds: Iterable[Round], again: Eager, *, where: str = "") -> None:
    """Replay on the inputs of each round, then on those of the first again; outputs are poisoned before each replay.

    Other values find what the host read and the capture froze; the last replay finds a graph that only works once. A
    graph that fails is refused with :attr:`Reason.MISMATCH`, and closed, as after any other error.
    """
    try:
        others = iter(rounds)
        first = next(others)
        for each in chain([first], others, [first]):
            out = [torch.empty_like(tensor) for tensor in each.expected]
            graph.poison(out)
            got = graph.replay(each.inputs, out)
            if (found := disagreement(got, each.expected, partial(again, each.inputs))) is not None:
                detail = f"output {found[0]} differed by {found[1]:.3g} on {each.name}"
                raise Refusal(Reason.MISMATCH, where, detail)
    except BaseException:
        graph.close()
        raise


def disagreement(
    got: Sequence[Tensor], expected: Sequence[Tensor], again: Callable[[], Sequence[Tensor]]
) -> tuple[int, float] | None:
    """The first output that differs from the eager one, and by how much; ``again`` runs where bits differ."""
    if same_bits(got, expected):
        return None
    runs = [expected]
    for index, (tensor, wanted) in enumerate(zip(got, expected, strict=True)):
        if same_bits([tensor], [wanted]):
            continue
        while len(runs) < 3:
            runs.append([each.detach() for each in again()])
        if not agrees(tensor, [run[index] for run in runs]):
            return index, largest_gap(tensor, wanted)
    return None


def agrees(got: Tensor, runs: Sequence[Tensor]) -> bool:
    """Whether a tensor has the bits of an eager run or, where those differ, is within their :data:`SPREADS`."""
    first = runs[0]
    if any(same_bits([got], [run]) for run in runs):
        return True
    if not _comparable(got, first) or all(same_bits([first], [run]) for run in runs[1:]):
        return False
    values = torch.stack([_wide(run) for run in runs])
    spread = (values.amax(0) - values.amin(0)).nan_to_num(nan=0.0)
    return _within(got, first, default_tolerances(first.dtype), spread=SPREADS * spread)


def check_repeats(outputs: Sequence[Tensor], wanted: Sequence[Tensor], where: str = "") -> None:
    """Refuse outputs that differ from those of the same call before by more than the order of sums."""
    if same_bits(outputs, wanted):
        return
    for index, (second, first) in enumerate(zip(outputs, wanted, strict=True)):
        if not _within(second, first, default_tolerances(first.dtype), UNORDERED):
            detail = f"output {index} differed by {largest_gap(second, first):.3g} between two runs"
            raise Refusal(Reason.NONDETERMINISTIC, where, detail)


def padded_gap(got: Tensor, wanted: Tensor, *, exactly: bool = False) -> float | None:
    """How far the cropped answer of a padded call is from that of the exact one; ``None`` if it may be so far.

    Per element :data:`PADDED` times the default tolerance of the dtype. With ``exactly``, only the same bits will do.
    """
    if same_bits([got], [wanted]):
        return None
    dtype = wanted.dtype
    if wanted.is_cuda and dtype in (torch.float32, torch.complex64) and _has_tf32():
        # Products in TF32 have the mantissa of float16.
        dtype = torch.float16
    rtol, atol = default_tolerances(dtype)
    if dtype.is_floating_point or dtype.is_complex:
        # An element near zero carries the rounding of the terms it is a sum of: at least one step of the dtype.
        atol = max(atol, torch.finfo(dtype).eps)
    if not exactly and _within(got, wanted, (rtol, atol), PADDED):
        return None
    return largest_gap(got, wanted)


def same_bits(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    """Whether pairs of tensors have the same shape, dtype and bits; NaN equals NaN of the same bits, 0.0 not -0.0."""
    if any(one.shape != other.shape or one.dtype != other.dtype for one, other in zip(left, right, strict=True)):
        return False
    if not left:
        return True
    # Copied first: one element may have any stride, with which nothing is viewed as bytes.
    # Quantised ones cannot be viewed so at all; they hold integers.
    plain = [[each.int_repr() if each.is_quantized else each for each in side] for side in (left, right)]
    dense = ([each.detach().clone(memory_format=torch.contiguous_format) for each in side] for side in plain)
    one, other = (torch.cat([each.view(-1).view(torch.uint8).to(left[0].device) for each in side]) for side in dense)
    return torch.equal(one, other)


def largest_gap(left: Tensor, right: Tensor) -> float:
    """The largest difference of two elements; infinite where shapes or dtypes differ, or one of them is not finite."""
    if not _comparable(left, right):
        return float("inf")
    one, other, alike = _elements(left, right)
    gaps = torch.where(alike, 0.0, (one - other).abs()).nan_to_num(nan=float("inf"), posinf=float("inf"))
    return float(gaps.max()) if gaps.numel() else 0.0


def perturb(inputs: Sequence[Tensor], *, negative: bool = False) -> list[Tensor]:
    """Other values of the same kind, which differ from each other.

    Floating values are rotated by one place, halved, and raised by a quarter and a little more from one element to the
    next; ``negative`` negates them. Integers and booleans are rotated on the CPU, where an index that no longer fits
    raises, and stay as they are on a device, where a kernel would read out of bounds.
    """
    changed = []
    with torch.inference_mode(False), torch.no_grad():
        for tensor in inputs:
            changed.append(static_copy(tensor))
            floating = tensor.is_floating_point() or tensor.is_complex()
            if tensor.numel() and (floating or not tensor.is_cuda):
                memory = packed(changed[-1])
                rolled = memory.flatten().roll(1)
                if floating:
                    # float8 has no arithmetic of its own.
                    rolled = rolled.float() if tensor.element_size() == 1 else rolled
                    step = torch.arange(rolled.numel(), device=tensor.device).remainder_(_STEPS) / 32
                    rolled = (rolled * 0.5 + 0.25 + step) * (-1 if negative else 1)
                memory.copy_(rolled.reshape(memory.shape))
    return changed


def _within(
    got: Tensor, wanted: Tensor, tolerances: tuple[float, float], times: int = 1, spread: Tensor | float = 0.0
) -> bool:
    """Whether elements are as near as tolerances (relative, absolute) and a spread; what is not finite is equal."""
    if not _comparable(got, wanted):
        return False
    rtol, atol = tolerances
    one, other, alike = _elements(got, wanted)
    near = (one - other).abs() <= spread + times * (atol + rtol * other.abs())
    return bool((alike | (near & one.isfinite() & other.isfinite())).all())


def _comparable(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and left.dtype == right.dtype


def _elements(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both as float64, a complex number as two, and where they are equal, NaN to NaN too."""
    one, other = _wide(left), _wide(right)
    return one, other, (one == other) | (one.isnan() & other.isnan())


def _wide(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor).double()


def _has_tf32() -> bool:
    """Whether cuDNN or cuBLAS may multiply in TF32."""
    try:
        return torch.backends.cudnn.allow_tf32 or torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:
        # Precisions were set one by one, in the newer way.
        return True
