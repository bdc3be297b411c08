from __future__ import annotations

import json

from bench import decode


def test_graphcache_and_eager_decode_the_same(tmp_path, capsys):
    assert decode.main(["--layers", "1", "--tokens", "20", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "decode.json").read_text())
    assert result["failures"] == []
    assert result["hits"] + sum(result["eager"].values()) + result["captures"] >= 20
    assert "largest error" in capsys.readouterr().out
