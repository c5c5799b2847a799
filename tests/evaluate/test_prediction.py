"""Mixes in the order of what calibration predicts of them are in that of what is measured."""

from itertools import pairwise
from pathlib import Path

import pytest

from dots1_local.calibrate.calibrate import calibrate
from dots1_local.convert import Conversion
from dots1_local.evaluate.kl_divergence import kl_divergence
from dots1_local.evaluate.perplexity import perplexity, read_text
from dots1_local.evaluate.texts import open_vocabulary, tokenize
from dots1_local.files.checkpoint import Checkpoint

CHUNKS = 8  # of 512 tokens, of either text
# A wide range, and damage in different places.
MIXES = {
    "DQ6": [],
    "DQ5": [],
    "DQ4": [],
    "Q8_0": ["attn_=IQ2_S"],
    "DQ3": [],
    "Q6_K": ["token_embd|output=Q2_K"],
    "DQ2": [],
    "IQ2_S": [],
    "IQ1_S": [],
}

pytestmark = pytest.mark.perplexity


@pytest.fixture(scope="module")
def calibrated(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, checkpoint = tmp_path_factory.mktemp("prediction") / "out", Checkpoint.open(tiny)
    with open_vocabulary(checkpoint) as vocabulary:
        tokens = tokenize(checkpoint, vocabulary, 512, [tiny / "calibration.txt"], [], CHUNKS)
    calibrate(checkpoint, folder, tokens, threads=1)
    return folder


def test_predictions_are_in_order(tiny: Path, calibrated: Path, tmp_path: Path) -> None:
    path, base = tmp_path / "model.gguf", tmp_path / "base.kld"
    Conversion.prepare(tiny, "BF16").run(path, threads=1)
    text = read_text(tiny / "heldout.txt")
    perplexity(path, text, n_chunks=CHUNKS, save_logits=base, threads=1)
    found = []
    for name, overrides in MIXES.items():
        mix = Conversion.prepare(
            tiny, name, calibration=calibrated, overrides=overrides, padding="on"
        )
        assert mix.predicted_kl is not None
        mix.run(path, threads=1, force=True)
        measured = kl_divergence(path, logits=base, threads=1).kl_divergence.value
        found.append((mix.predicted_kl, measured, name))
    found.sort()
    assert all(before < after for (_, before, _), (_, after, _) in pairwise(found)), found
