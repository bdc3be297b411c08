"""A new graph's replay must equal the eager answer, or the graph is never used."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from graphcache.errors import Reason, Refusal
from graphcache.graphs.buffers import packed, poison, static_copy
from graphcache.graphs.graph import Graph

Answer = Callable[[Sequence[Tensor]], Sequence[Tensor]]
RELATIVE = 1e-3
"""Largest accepted difference, as a share of the largest magnitude in an output. A replay runs the very kernels that
eager execution ran, so the two are equal but for atomics and split reductions; fp32 products in TF32 differ so much."""


def verify(
    graph: Graph,
    inputs: Sequence[Tensor],
    expected: Sequence[Tensor],
    others: Sequence[Tensor],
    expected_others: Sequence[Tensor],
    *,
    where: str = "",
    tolerance: float = RELATIVE,
) -> None:
    """Replay on the inputs of the capture, then on other values, then on the first again; outputs poisoned before each.

    The second finds values that the host read and the capture froze. The third finds a replay that only works once.

    Args:
        graph: The new graph.
        inputs: What it was captured with.
        expected: The eager outputs for them.
        others: Inputs of the same shapes with other values, see :func:`perturb`.
        expected_others: The eager outputs for those.
        where: The engine or module, for the message.
        tolerance: Largest accepted difference, see :func:`difference`; 0 on the host, where a replay repeats eager
            execution bit for bit.

    Raises:
        Refusal: With :attr:`Reason.MISMATCH`, saying which output differed, by how much, on which inputs.
    """
    rounds = (("the inputs of the capture", inputs, expected), ("inputs of other values", others, expected_others))
    for name, given, wanted in (*rounds, rounds[0]):
        out = [torch.empty_like(tensor) for tensor in wanted]
        poison(out)
        graph.poison()
        got = graph.replay(given, out)
        for index, (left, right) in enumerate(zip(got, wanted, strict=True)):
            error = difference(left, right)
            if not error <= tolerance_of(right, tolerance):
                raise Refusal(Reason.MISMATCH, where, f"output {index} differed by {error:.3g} (relative) on {name}")


def alike(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    """Whether tensors of one device are equal but for what :func:`tolerance_of` accepts.

    Where their bits are, it waits for the device only once.

    Example:
        >>> alike([torch.zeros(2), torch.ones(2)], [torch.zeros(2), torch.ones(2)])
        True
        >>> alike([torch.zeros(2)], [torch.ones(2)])
        False
    """
    pairs = list(zip(left, right, strict=True))
    if pairs and all(a.shape == b.shape and a.dtype == b.dtype for a, b in pairs):
        first, second = (torch.cat([_bits(tensor).view(torch.uint8) for tensor in each]) for each in (left, right))
        if torch.equal(first, second):
            return True
    return all(difference(a, b) <= tolerance_of(b) for a, b in pairs)


def tolerance_of(tensor: Tensor, relative: float = RELATIVE) -> float:
    """The largest accepted difference for a tensor's dtype: ``relative``, or four steps of a coarser dtype.

    float16 has 1e-3 from one number to the next, bfloat16 8e-3: a sum in another order may end one step further.

    Example:
        >>> tolerance_of(torch.zeros(1)), tolerance_of(torch.zeros(1, dtype=torch.bfloat16))
        (0.001, 0.03125)
    """
    if relative == 0 or not (tensor.is_floating_point() or tensor.is_complex()):
        return relative
    return max(relative, 4 * torch.finfo(tensor.dtype).eps)


def perturb(inputs: Sequence[Tensor]) -> list[Tensor]:
    """Other values of the same kind.

    Floating values are rotated by one place, halved and raised by a quarter. Integers and booleans are rotated on the
    CPU, where an index that no longer fits raises; on a device they stay as they are, since it would read out of bounds
    there, and a value that the host reads there cannot be captured anyway.

    Args:
        inputs: Strided tensors.

    Example:
        >>> perturb([torch.tensor([2.0, 4.0]), torch.tensor([5, 6, 7])])
        [tensor([2.2500, 1.2500]), tensor([7, 5, 6])]
    """
    changed = []
    with torch.inference_mode(False), torch.no_grad():
        for tensor in inputs:
            other = static_copy(tensor)
            memory = packed(other)
            floating = tensor.is_floating_point() or tensor.is_complex()
            if tensor.numel() and (floating or not tensor.is_cuda):
                rolled = memory.contiguous().flatten().roll(1).reshape(memory.shape)
                if floating:
                    # float8 has no arithmetic of its own.
                    rolled = rolled.float() if tensor.element_size() == 1 else rolled
                    rolled = rolled * 0.5 + 0.25
                memory.copy_(rolled)
            changed.append(other)
    return changed


def difference(left: Tensor, right: Tensor) -> float:
    """The largest difference of two tensors, as a share of the largest finite magnitude in ``right``.

    Equal bits give 0, NaN and infinities are equal to themselves in the same places. Integers and booleans differ by 0
    or infinitely: there is no small difference between two indices.

    Example:
        >>> difference(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5]))
        0.2
    """
    if left.shape != right.shape or left.dtype != right.dtype:
        return float("inf")
    if left.numel() == 0 or torch.equal(_bits(left), _bits(right)):
        return 0.0
    if not (left.is_floating_point() or left.is_complex()):
        return float("inf")
    if left.is_complex():
        left, right = torch.view_as_real(left.resolve_conj()), torch.view_as_real(right.resolve_conj())
    left, right = left.double(), right.double()
    finite = right.isfinite()
    if not torch.equal(left.isfinite(), finite):
        return float("inf")
    special = ~finite
    if not torch.equal(left[special].nan_to_num(nan=7.0), right[special].nan_to_num(nan=7.0)):
        return float("inf")
    scale = right[finite].abs().max().item() if bool(finite.any()) else 0.0
    gap = (left[finite] - right[finite]).abs().max().item() if bool(finite.any()) else 0.0
    return gap / scale if scale else (0.0 if gap == 0 else float("inf"))


def _bits(tensor: Tensor) -> Tensor:
    dense = torch.empty(tensor.numel(), dtype=tensor.dtype, device=tensor.device)
    dense.copy_(tensor.detach().reshape(-1))
    return dense if tensor.dtype is torch.bool else dense.view(torch.uint8)
