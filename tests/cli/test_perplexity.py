import json
from pathlib import Path

import numpy as np
from typer.testing import CliRunner

from dots1_local.cli import app
from tests.helpers import CONFIG, write_random_gguf


def test_prints_the_line_llama_perplexity_prints(tmp_path: Path) -> None:
    zeros = np.zeros((CONFIG.vocab_size, CONFIG.hidden_size), np.float32)
    model = write_random_gguf(tmp_path / "model.gguf", tensors={"output.weight": zeros})
    (tmp_path / "text.txt").write_text("abc" * 100)
    command = ["perplexity", str(model), "-f", str(tmp_path / "text.txt"), "-c", "64", "-t", "1"]
    result = CliRunner().invoke(app, command)
    assert result.stdout == "Final estimate: PPL = 268.0000 +/- 0.00000\n"
    as_json = json.loads(CliRunner().invoke(app, [*command, "--json", "--chunks", "2"]).stdout)
    assert (as_json["chunks"], as_json["n_ctx"], as_json["tokens"]) == (2, 64, 62)
