from pathlib import Path

import numpy as np
import pytest

from dots1_local.evaluate import scoring
from tests.helpers import CONFIG, write_random_gguf

TEXT = "".join(chr(33 + index * index % 90) for index in range(700))  # no merge applies


@pytest.mark.parametrize("n_ctx", [3, 4, 9, 64, 333])
def test_every_token_of_the_second_halves_is_scored_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_ctx: int
) -> None:
    monkeypatch.setattr(scoring, "_BLOCK", 3 * CONFIG.vocab_size)
    path = write_random_gguf(tmp_path / "model.gguf")
    with scoring.open_engine(path, n_ctx, threads=1) as engine:
        chunks = scoring.cut(engine, TEXT, n_ctx, None)
        times = np.zeros((len(chunks), n_ctx), int)
        for ubatch in scoring.score(engine, chunks):
            for block in ubatch.blocks:
                first = n_ctx // 2 + block.start + 1
                place = slice(first, first + len(block.targets))
                assert (block.targets == chunks[block.chunk, place]).all()
                assert block.logits.shape == (len(block.targets), engine.n_vocab)
                assert 0 < len(block.targets) <= 3  # what a thread makes of a block stays small
                times[block.chunk, place] += 1
    assert len(chunks) == 700 // n_ctx
    assert (times[:, n_ctx // 2 + 1 :] == 1).all()
    assert not times[:, : n_ctx // 2 + 1].any()
