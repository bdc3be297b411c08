"""Batching in front of an encoder, on the host, with torch in the place of the engine."""

import numpy as np
import pytest
import torch
from torch import nn

from bench import record, serving, store


class Encoder(nn.Module):
    """Vectors of tokens, weighted by the mask; about as an encoder's embedding."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(50, 8).requires_grad_(False)

    def forward(self, input_ids, attention_mask):
        weights = attention_mask[..., None].float()
        return (self.table(input_ids).tanh() * weights).sum(1) / weights.sum(1)


class Leaky(Encoder):
    """Forgets about the mask, so that margins show."""

    def forward(self, input_ids, attention_mask):
        return self.table(input_ids).tanh().mean(1) + 0 * attention_mask.sum(1, keepdim=True)


@pytest.fixture
def bundle(tmp_path):
    draw = np.random.default_rng(0)
    lengths = draw.integers(2, 40, size=60)
    ids = draw.integers(1, 50, size=lengths.sum())
    encoder = Encoder()
    parts = [torch.from_numpy(each)[None] for each in np.split(ids, np.cumsum(lengths)[:-1])]
    answers = torch.cat([encoder(each, torch.ones_like(each)) for each in parts])
    arrays = {"ids": ids, "lengths": lengths, "answers": answers.numpy()}
    return store.Bundle("minilm", tmp_path / "minilm.engine", arrays, {"kind": "sentences"})


def test_all_ways_answer_right_and_batches_have_captured_sizes(bundle, capsys):
    result, failures = serving.run(bundle, [1, 6], 2, 0.001, source=Encoder)
    assert failures == []
    assert len(result["systems"]) == 6
    assert result["captures"] == 18
    assert result["accuracy"]["together"]["swapped"] == 0
    for name, each in result["systems"].items():
        assert each["latency_us"]["n"] == 120, name
        assert each["requests_per_second"] > 0
        assert set(each["batches"]) <= set(serving.ROWS)
    assert sum(result["systems"]["one_by_one, 6 callers"]["batches"].values()) == 120
    assert sum(result["systems"]["together, 6 callers"]["batches"].values()) < 120
    assert 0 < result["systems"]["together, 6 callers"]["padding_share"] < 1
    serving._print(result)
    assert "together, 6 callers" in capsys.readouterr().out


def test_what_is_wrong_is_told(bundle):
    """A module whose margins show is run one by one, which is right and no benchmark of batches."""
    _, failures = serving.run(bundle, [2], 1, 0.0, source=Leaky)
    assert any(each.startswith("requests run one by one: padding ") for each in failures)
    assert any("eager calls" in each for each in failures)


def test_swapped_answers_are_found(bundle):
    cases = bundle.sentences()
    answers = [case.answer for case in cases]
    assert serving._accuracy(answers, cases)["swapped"] == 0
    answers[3], answers[7] = answers[7], answers[3]
    assert serving._accuracy(answers, cases)["swapped"] == 2


def test_an_error_of_a_caller_is_raised():
    def call(request):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        serving._many(call, [{}] * 5, 3, 2)


def test_it_needs_a_device(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"bench\.serving"):
        serving.main(["--engines", str(tmp_path)])
    assert record.RESULTS.name == "results"
