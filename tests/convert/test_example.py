"""The example converted end to end: the same bytes as stock, loaded by stock."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from dots1_local.convert import Conversion, convert_checkpoint
from dots1_local.engine.engine import Engine
from dots1_local.files.gguf import GGUFFile
from dots1_local.quant.imatrix_file import load_importance
from dots1_local.quant.stock import stock_mix
from tests.conftest import Converted
from tests.micro import micro_checkpoint
from tests.quant.stock_llama import read_bytes, stock_quantise, tensors_of
from tests.workers import start_dots1


@pytest.mark.parametrize(
    ("mix", "with_importance"),
    [("Q4_K_M", False), ("Q4_K_M", True), ("Q2_K", False), ("Q2_K", True), ("IQ3_XXS", True)],
)
def test_stock_mixes_are_what_stock_writes(
    tiny: Path, converted: Converted, tmp_path: Path, mix: str, with_importance: bool
) -> None:
    imatrix = tiny / "imatrix.gguf"
    options = {"imatrix": imatrix} if with_importance else {}
    importance = None
    if with_importance:
        loaded = load_importance(imatrix)
        values = ((name, loaded.get(name)) for name in loaded.tensors)
        importance = {name: value for name, value in values if value is not None}
    stock = tmp_path / "stock.gguf"
    stock_quantise(converted("BF16"), stock, stock_mix(mix).file_type, importance)
    ours, theirs = tensors_of(converted(mix, **options)), tensors_of(stock)
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert (name, ours[name].type) == (name, expected.type)
        same = np.array_equal(read_bytes(ours[name].file, ours[name]), read_bytes(stock, expected))
        assert same, name


def test_keys_keep_their_order(converted: Converted) -> None:
    # A conversion that was interrupted resumes only if the header is the same to the byte.
    keys = [key for key in GGUFFile.open(converted("BF16")).keys if key.startswith("dots1.")]
    assert keys == [
        "dots1.block_count",
        "dots1.context_length",
        "dots1.embedding_length",
        "dots1.feed_forward_length",
        "dots1.vocab_size",
        "dots1.attention.head_count",
        "dots1.attention.head_count_kv",
        "dots1.attention.key_length",
        "dots1.attention.value_length",
        "dots1.rope.dimension_count",
        "dots1.rope.freq_base",
        "dots1.attention.layer_norm_rms_epsilon",
        "dots1.leading_dense_block_count",
        "dots1.expert_count",
        "dots1.expert_used_count",
        "dots1.expert_shared_count",
        "dots1.expert_feed_forward_length",
        "dots1.expert_weights_scale",
        "dots1.expert_weights_norm",
        "dots1.expert_gating_func",
    ]


def test_shards_load_as_one_model(tiny: Path, converted: Converted, tmp_path: Path) -> None:
    paths = convert_checkpoint(tiny, tmp_path / "out.gguf", "DQ4", split_max_size=3 << 20).paths
    assert len(paths) > 3
    rows = []
    for path in (converted("DQ4"), paths[0]):
        with Engine.open(path, n_ctx=64, threads=1) as engine:
            rows.append(engine.decode(engine.tokenize("Once upon a time", special=False), 0).copy())
    assert np.array_equal(rows[0], rows[1])
    assert len(GGUFFile.open(paths[0]).tensors) == len(GGUFFile.open(converted("DQ4")).tensors)


def test_ctrl_c_leaves_what_can_be_resumed(tmp_path: Path) -> None:
    source = micro_checkpoint(tmp_path / "hf", hidden_size=1024, vocab_size=60_000)
    output = tmp_path / "out.gguf"
    options = ("-o", str(output), "--type", "Q2_K", "--threads", "1")
    process = start_dots1("convert", str(source), *options)
    journal = output.with_name(output.name + ".journal")
    while process.poll() is None and not (journal.exists() and journal.stat().st_size > 200):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    _, complaints = process.communicate()
    assert process.returncode == 130
    assert complaints.startswith("stopped; run the same command again")
    assert not output.exists()
    result = Conversion.prepare(source, "Q2_K").run(output)
    assert result.resumed_tensors > 0
    assert list(tmp_path.glob("out*")) == [output]
