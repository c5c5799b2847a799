from pathlib import Path

import numpy as np
import pytest

from dots1_local.chat.kv_cache import KVCache
from dots1_local.engine.engine import Engine
from tests.helpers import write_random_gguf

TEXT = list(b"the quick brown fox")


def test_only_what_is_new_is_computed(tmp_path: Path, submitted: list[int]) -> None:
    path = write_random_gguf(tmp_path / "model.gguf")
    with Engine.open(path, n_ctx=64, n_ubatch=8, threads=1) as engine:
        cache = KVCache(engine)
        assert cache.hold(TEXT) == 0
        cache.append([1])
        assert (submitted, len(cache)) == ([8, 8, 3, 1], 20)
        submitted.clear()
        assert cache.hold([*TEXT, 1, 2]) == 20
        assert cache.hold(TEXT[:5]) == 4  # the last one again, for its logits
        assert cache.hold([*TEXT[:3], 9]) == 3
        assert submitted == [1, 1, 1]


@pytest.mark.parametrize("name", ["submit", "forget"])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_interrupted_call_leaves_no_wrong_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, moment: str
) -> None:
    path = write_random_gguf(tmp_path / "model.gguf")
    with Engine.open(path, n_ctx=64, n_ubatch=8, threads=1, kv_type="F32") as engine:
        expected = engine.decode(TEXT, 0).copy()
        engine.forget()
        cache = KVCache(engine)
        cache.hold([*TEXT, 1, 2, 3])
        original = getattr(engine, name)

        def interrupted(*arguments: object) -> None:
            if moment == "after":
                original(*arguments)
            raise KeyboardInterrupt

        monkeypatch.setattr(engine, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            cache.hold([*TEXT[:7], 9])
        monkeypatch.setattr(engine, name, original)
        cache.hold(TEXT[:-1])
        np.testing.assert_allclose(engine.decode(TEXT[-1:], len(cache)), expected, atol=1e-4)
