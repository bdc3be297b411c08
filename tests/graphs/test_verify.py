from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from graphcache.errors import Reason, Refusal
from graphcache.graphs.buffers import static_copy
from graphcache.graphs.verify import RELATIVE, alike, difference, perturb, verify
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

    def poison(self) -> None:
        self.last = torch.full_like(self.last, NAN)

    def close(self, *, wait: bool = True) -> None:
        pass


def judge(function: Callable[[Tensor], Tensor | None], eager: Callable[[Tensor], Tensor] = lambda x: x * 2) -> None:
    x, other = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0])
    verify(Graph(function, eager(x)), [x], [eager(x)], [other], [eager(other)], where="net")


def test_a_graph_that_does_what_eager_does_is_accepted():
    judge(lambda x: x * 2)


def test_a_graph_that_writes_nothing_is_found_by_the_poison():
    with pytest.raises(
        Refusal, match=r"\(at net\): output 0 differed by inf \(relative\) on the inputs of the capture"
    ):
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


def test_what_split_reductions_may_differ_by_is_accepted_and_more_is_not():
    judge(lambda x: x * 2 * (1 + RELATIVE / 2))
    with pytest.raises(Refusal, match=r"differed by 0\.002 "):
        judge(lambda x: x * 2 * 1.002)


@given(tensors())
def test_no_difference_between_a_tensor_and_its_copy(tensor):
    assert difference(tensor, static_copy(tensor)) == 0.0


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        ([1.0, 2.0], [1.0, 2.5], 0.2),
        ([1.0, NAN], [1.0, NAN], 0.0),
        ([1.0, NAN], [1.5, NAN], pytest.approx(1 / 3)),
        ([NAN, 1.0], [1.0, NAN], INF),
        ([INF, 1.0], [INF, 1.0], 0.0),
        ([INF, 1.0], [-INF, 1.0], INF),
        ([INF, 1.0], [NAN, 1.0], INF),
        ([0.0, 0.0], [0.0, 1e-30], 1.0),
        ([1e-30], [0.0], INF),
        ([0.0], [-0.0], 0.0),
        ([3, 4], [3, 5], INF),
        ([True], [False], INF),
        ([1 + 1j], [1 - 1j], 2.0),
    ],
)
def test_the_difference_of(left, right, expected):
    assert difference(torch.tensor(left), torch.tensor(right)) == expected


def test_other_shapes_and_dtypes_differ_infinitely():
    assert difference(torch.zeros(2), torch.zeros(1, 2)) == INF
    assert difference(torch.zeros(2), torch.zeros(2).double()) == INF
    assert difference(torch.zeros(0, 2), torch.zeros(0, 2)) == 0.0


def test_conjugate_and_negative_views_differ_from_nothing_but_other_values():
    z = torch.tensor([1 + 2j, 3 - 1j])
    assert difference(z.conj(), z.conj().resolve_conj()) == 0.0
    assert difference(z.conj().imag, (-z.imag).clone()) == 0.0
    assert difference(z.conj(), z) > 0.5


@given(st.lists(tensors().map(static_copy), max_size=3))
def test_perturbed_inputs_are_of_the_same_kind_and_the_originals_untouched(given_tensors):
    before = [static_copy(tensor) for tensor in given_tensors]
    for tensor, other in zip(given_tensors, perturb(given_tensors), strict=True):
        assert (other.shape, other.dtype) == (tensor.shape, tensor.dtype)
        assert other.untyped_storage()._cdata != tensor.untyped_storage()._cdata
    assert all(map(same, given_tensors, before))


@pytest.mark.parametrize(
    "values",
    [[2.0, 4.0], [5.0], [0.0, 0.0], [1 + 1j, 0j], [1, 2], [True, False]],
    ids=str,
)
def test_perturbed_values_differ(values):
    tensor = torch.tensor(values)
    assert not torch.equal(perturb([tensor])[0], tensor)


def test_indices_stay_indices():
    tensor = torch.tensor([5, 6, 7])
    assert sorted(perturb([tensor])[0].tolist()) == [5, 6, 7]


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        ([], [], True),
        ([[1.0, NAN]], [[1.0, NAN]], True),
        ([[1.0], [2.0]], [[1.0], [2.0005]], True),
        ([[1.0], [2.0]], [[1.0], [2.5]], False),
        ([[1.0, NAN]], [[1.0, 1.0]], False),
        ([[1.0]], [[1.0, 1.0]], False),
    ],
)
def test_alike(left, right, expected):
    assert alike([torch.tensor(each) for each in left], [torch.tensor(each) for each in right]) is expected


def test_alike_looks_at_integers_exactly():
    assert alike([torch.tensor([1 << 40])], [torch.tensor([1 << 40])])
    assert not alike([torch.tensor([(1 << 40) + 1])], [torch.tensor([1 << 40])])
