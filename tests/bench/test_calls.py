from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench import calls, store
from tests.bench.fakes import CPU, bundle, right, sentences

batches = st.tuples(*[st.integers(1, 40)] * 3).map(sorted).map(tuple)


def of_batch(batch):
    return store.Bundle("net", None, {}, {"kind": "rows", "batch": batch})


@given(batches, st.integers(2, 60))
def test_several_sizes_are_spread_from_the_smallest_to_the_largest(batch, count):
    low, _, high = batch
    sizes = calls.spread(of_batch(batch), count)
    if high > low:
        assert len(sizes) == min(count, high - low + 1)
        assert (sizes[0], sizes[-1]) == (low, high)
    gaps = [after - before for before, after in pairwise(sizes)]
    assert all(gap >= 1 for gap in gaps)
    assert not gaps or max(gaps) - min(gaps) <= 1


@given(batches)
def test_a_single_size_is_the_one_that_the_engine_was_tuned_for(batch):
    assert calls.spread(of_batch(batch), 1) == [batch[1]]


def test_sizes_take_turns_with_tensors_of_their_own(tmp_path):
    pool = calls.pool(bundle(tmp_path), [1, 5, 8], 3, CPU)
    assert [call.size for call in pool] == [1, 5, 8] * 3
    assert len({call.inputs[0].data_ptr() for call in pool}) == len(pool)
    for call in pool:
        (x,) = call.inputs
        assert x.shape == (call.size, 4)
        torch.testing.assert_close(right(x), call.answer)


def test_inputs_come_in_the_order_that_is_asked_for(tmp_path):
    words = sentences(tmp_path)
    (call, *_) = calls.pool(words, [3], 1, CPU)
    (turned, *_) = calls.pool(words, [3], 1, CPU, ["attention_mask", "input_ids"])
    assert call.inputs[0].tolist() == turned.inputs[1].tolist() == [[2, 3, 4]]
    assert call.inputs[1].tolist() == turned.inputs[0].tolist() == [[1, 1, 1]]


def test_a_name_that_is_no_input_is_refused(tmp_path):
    with pytest.raises(ValueError, match="net has the inputs x, not z"):
        calls.pool(bundle(tmp_path), [1], 1, CPU, ["z"])


def test_calls_come_round_again():
    turn = calls.in_turn([lambda: "a", lambda: "b", lambda: "c"])
    assert [turn() for _ in range(7)] == list("abcabca")
