"""The benchmark of a decode loop on the CPU."""

import json

import pytest

from bench import decode

pytest.importorskip("transformers")


def test_graphcache_and_eager_decode_the_same(tmp_path, capsys):
    assert decode.main(["--layers", "1", "--tokens", "20", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "decode.json").read_text())
    assert result["failures"] == []
    assert result["equal_tokens"] == {"eager": 20, "graphcache": 20}
    assert result["graphs"]["graphcache"]["captures"] == 1
    assert result["graphs"]["graphcache"]["hits"] >= 20
    assert "equal_tokens" in capsys.readouterr().out
