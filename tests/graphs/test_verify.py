from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from graphcache.errors import Reason, Refusal
from graphcache.graphs.buffers import poison, static_copy
from graphcache.graphs.verify import (
    Round,
    agrees,
    check_repeats,
    disagreement,
    largest_gap,
    padded_gap,
    perturb,
    same_bits,
    verify,
)
from tests.helpers import same, tensors

NAN, INF = math.nan, math.inf


class Graph:
    """A graph that computes whatever it is given, into outputs of its own that stay from replay to replay."""

    nodes, nbytes = 1, 0

    def __init__(self, function: Callable[[Tensor], Tensor | None], last: Tensor) -> None:
        self.function = function
        self.last = last.clone()

    def replay(self, inputs: Sequence[Tensor], out: list[Tensor] | None = None) -> list[Tensor]:
        made = self.function(inputs[0])
        if made is not None:
            self.last = made
        if out is None:
            return [self.last]
        out[0].copy_(self.last)
        return out

    def poison(self, out: Sequence[Tensor] = ()) -> None:
        self.last = torch.full_like(self.last, NAN)
        poison(out)

    def close(self, *, wait: bool = True) -> None:
        pass


def have_same_bits(left: Tensor, right: Tensor) -> bool:
    return same_bits([left], [right])


def judge(
    function: Callable[[Tensor], Tensor | None],
    eager: Callable[[Tensor], Tensor] = lambda x: x * 2,
    again: Callable[[Tensor], Tensor] | None = None,
) -> None:
    x, other = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0])
    rounds = [
        Round("the inputs of the capture", [x], [eager(x)]),
        Round("inputs of other values", [other], [eager(other)]),
    ]
    verify(Graph(function, eager(x)), rounds, lambda inputs: [(again or eager)(inputs[0])], where="net")


def test_a_graph_that_does_what_eager_does_is_accepted():
    judge(lambda x: x * 2)


def test_a_graph_that_writes_nothing_is_found_by_the_poison():
    with pytest.raises(Refusal, match=r"\(at net\): output 0 differed by inf on the inputs of the capture"):
        judge(lambda x: None)


def test_a_graph_that_froze_a_value_is_found_by_the_other_inputs():
    frozen = torch.tensor([2.0, 4.0])
    with pytest.raises(Refusal, match="on inputs of other values") as refused:
        judge(lambda x: frozen.clone())
    assert refused.value.cause.reason is Reason.MISMATCH


def test_a_graph_that_works_only_twice_is_found_by_the_third_round():
    replays = []

    def tired(x: Tensor) -> Tensor:
        replays.append(x)
        return x * (2 if len(replays) < 3 else 3)

    with pytest.raises(Refusal, match="on the inputs of the capture"):
        judge(tired)
    assert len(replays) == 3


def test_where_eager_repeats_itself_every_bit_counts():
    with pytest.raises(Refusal, match=r"differed by [0-9.]+e-07 on"):
        judge(lambda x: torch.nextafter(x * 2, torch.tensor(INF)))


def test_where_eager_does_not_repeat_itself_its_spread_counts():
    eager = iter([0.0, 0.01] * 9)
    judge(lambda x: x * 2 + 0.03, again=lambda x: x * 2 + next(eager))
    eager = iter([0.0, 0.01] * 9)
    with pytest.raises(Refusal, match=r"differed by 0\.05"):
        judge(lambda x: x * 2 + 0.05, again=lambda x: x * 2 + next(eager))


def test_eager_runs_again_only_where_bits_differ():
    ran = []
    judge(lambda x: x * 2, again=lambda x: ran.append(x) or x * 2)
    assert not ran


RUNS = [torch.tensor([1e6, 1.0, 1e-3]), torch.tensor([1e6, 1.0, 1e-3]), torch.tensor([1e6, 1.001, 1e-3])]


@pytest.mark.parametrize(
    ("got", "expected"),
    [
        ([1e6, 1.0, 1e-3], True),
        ([1e6, 1.0039, 1e-3], True),
        ([1e6, 1.0041, 1e-3], False),
        ([1e6, 0.9961, 1e-3], True),
        # Nothing is measured by the largest value of the tensor, nor by the spread of another element.
        ([1e6 + 1, 1.0, 1e-3], True),
        ([1e6 + 2, 1.0, 1e-3], False),
        ([1e6, 1.0, 1.009e-3], True),
        ([1e6, 1.0, 1.02e-3], False),
        ([1e6, NAN, 1e-3], False),
        ([INF, 1.0, 1e-3], False),
    ],
)
def test_each_element_may_differ_by_its_own_spread_and_the_tolerance_of_its_dtype(got, expected):
    assert agrees(torch.tensor(got), RUNS) is expected


def test_what_agrees_in_other_dtypes():
    one, other = torch.tensor([5, 7]), torch.tensor([5, 8])
    assert agrees(torch.tensor([5, 8]), [one, one, other])
    assert agrees(torch.tensor([5, 10]), [one, one, other])
    assert not agrees(torch.tensor([6, 7]), [one, one, other])
    assert not agrees(torch.tensor([5, 7], dtype=torch.int32), [one, one, other])
    z, w = torch.tensor([1 + 1j, 2j]), torch.tensor([1 + 1.001j, 2j])
    assert agrees(torch.tensor([1 + 1.003j, 2j]), [z, w, z])
    assert not agrees(torch.tensor([1.003 + 1j, 2j]), [z, w, z])
    nan = torch.tensor([NAN, 1.0])
    assert agrees(torch.tensor([NAN, 1.0001]), [nan, nan, torch.tensor([NAN, 1.0001])])
    assert not agrees(torch.tensor([2.0, 1.0]), [nan, nan, torch.tensor([NAN, 1.0001])])


def test_the_first_output_that_disagrees_is_told():
    x = torch.ones(2)
    assert disagreement([x, x], [x, x], lambda: [x, x]) is None
    assert disagreement([x, x + 1, x + 2], [x, x, x], lambda: [x, x, x]) == (1, 1.0)
    assert disagreement([torch.ones(3)], [x], lambda: [x]) == (0, INF)
    assert disagreement([], [], list) is None


@pytest.mark.parametrize(
    ("dtype", "near", "far"),
    [
        (torch.float32, 1e-4, 1e-3),
        (torch.float64, 1e-6, 1e-4),
        (torch.float16, 1e-2, 0.05),
        (torch.bfloat16, 0.1, 0.5),
    ],
    ids=str,
)
def test_eager_repeats_itself_but_for_the_order_of_sums(dtype, near, far):
    x = torch.ones(2, dtype=dtype)
    check_repeats([x, x], [x, x])
    check_repeats([x, x + near], [x, x])
    # Not even where a larger value is beside it.
    large = torch.tensor([1e4, 1.0], dtype=dtype)
    beside = large + torch.tensor([0.0, far], dtype=dtype)
    for second, first in ((x + far, x), (beside, large), (torch.tensor([1]), torch.tensor([2]))):
        with pytest.raises(Refusal, match=r"output 1 differed by .* between two runs"):
            check_repeats([x, second], [x, first])


@pytest.mark.parametrize(
    ("dtype", "near", "far"),
    [(torch.float32, 5e-5, 2e-4), (torch.float16, 5e-3, 0.05), (torch.bfloat16, 0.05, 0.5)],
    ids=str,
)
def test_padded_answers_may_differ_by_what_other_kernels_round(dtype, near, far):
    x = torch.tensor([0.0, 1.0], dtype=dtype)
    assert padded_gap(x, x) is None
    assert padded_gap(x + near, x) is None
    assert padded_gap(x + near, x, exactly=True) == pytest.approx(near, rel=0.2)
    assert padded_gap(x + far, x) == pytest.approx(far, rel=0.2)
    assert padded_gap(torch.tensor([1, 2]), torch.tensor([1, 3])) == 1.0
    assert padded_gap(torch.zeros(2), torch.zeros(3)) == INF


@given(tensors())
def test_a_tensor_and_its_copy_have_the_same_bits(tensor):
    copy = static_copy(tensor)
    assert have_same_bits(tensor, copy)
    assert same_bits([tensor, copy], [copy, tensor])
    assert largest_gap(tensor, copy) == 0.0


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        ([1.0, 2.0], [1.0, 2.5], 0.5),
        ([1.0, NAN], [1.0, NAN], 0.0),
        ([1.0, NAN], [1.5, NAN], 0.5),
        ([NAN, 1.0], [1.0, NAN], INF),
        ([INF, 1.0], [INF, 1.0], 0.0),
        ([INF, 1.0], [-INF, 1.0], INF),
        ([INF, 1.0], [NAN, 1.0], INF),
        ([3, 4], [3, 5], 1.0),
        ([True], [False], 1.0),
        ([1 + 1j], [1 - 1j], 2.0),
        ([], [], 0.0),
    ],
)
def test_the_largest_gap_of(left, right, expected):
    one, other = torch.tensor(left), torch.tensor(right)
    assert largest_gap(one, other) == expected
    assert have_same_bits(one, other) is (expected == 0)


def test_other_shapes_dtypes_and_signs_of_zero_have_other_bits():
    assert largest_gap(torch.zeros(2), torch.zeros(1, 2)) == INF
    assert largest_gap(torch.zeros(2), torch.zeros(2).double()) == INF
    assert not have_same_bits(torch.zeros(2), torch.zeros(1, 2))
    assert not have_same_bits(torch.zeros(2), torch.zeros(2).double())
    assert not have_same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert have_same_bits(torch.zeros(0, 2), torch.zeros(0, 2))
    for size in (0, 1):
        assert have_same_bits(torch.arange(4.0)[::2][:size], torch.zeros(size)), "of another stride"


def test_conjugate_and_negative_views_have_the_bits_of_what_they_show():
    z = torch.tensor([1 + 2j, 3 - 1j])
    assert have_same_bits(z.conj(), z.conj().resolve_conj())
    assert have_same_bits(z.conj().imag, (-z.imag).clone())
    assert not have_same_bits(z.conj(), z)


@given(st.lists(tensors().map(static_copy), max_size=3))
def test_perturbed_inputs_are_of_the_same_kind_and_the_originals_untouched(given_tensors):
    before = [static_copy(tensor) for tensor in given_tensors]
    for tensor, other in zip(given_tensors, perturb(given_tensors), strict=True):
        assert (other.shape, other.dtype) == (tensor.shape, tensor.dtype)
        assert other.untyped_storage()._cdata != tensor.untyped_storage()._cdata
    assert all(map(same, given_tensors, before))


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize(
    "values",
    [[2.0, 4.0], [5.0], [0.0, 0.0], [1.0, 1.0, 1.0], [NAN, NAN], [1 + 1j, 0j], [1, 2], [True, False]],
    ids=str,
)
def test_perturbed_values_differ(values, negative):
    tensor = torch.tensor(values)
    other = perturb([tensor], negative=negative)[0]
    assert not torch.equal(other, tensor)
    if tensor.is_floating_point() and not tensor.isnan().any():
        assert other.unique().numel() == other.numel()
        assert bool(((other < 0) == negative).all())


def test_perturbed_values_lie_as_the_originals_do():
    for tensor in (torch.ones(2, 3).t(), torch.ones(1, 3).expand(2, 3), torch.arange(5.0).unfold(0, 3, 1)):
        other = perturb([tensor])[0]
        assert other.stride() == tensor.stride()
        assert not torch.equal(other, tensor)


def test_indices_stay_indices():
    tensor = torch.tensor([5, 6, 7])
    assert sorted(perturb([tensor])[0].tolist()) == [5, 6, 7]


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        ([], [], True),
        ([[1.0, NAN]], [[1.0, NAN]], True),
        ([[1.0], [2.0]], [[1.0], [2.0000002]], False),
        ([[1.0, NAN]], [[1.0, 1.0]], False),
        ([[1.0]], [[1.0, 1.0]], False),
        ([[1 << 40]], [[(1 << 40) + 1]], False),
    ],
)
def test_all_bits(left, right, expected):
    assert same_bits([torch.tensor(each) for each in left], [torch.tensor(each) for each in right]) is expected
