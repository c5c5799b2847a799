import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from tokenizers import Tokenizer

from dots1_local.architecture import inventory
from dots1_local.files.checkpoint import Checkpoint
from tests.micro import micro_checkpoint
from tools.make_wide import published_config, write_checkpoint


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole published geometry, without weights."""
    folder = tmp_path_factory.mktemp("full")
    return write_checkpoint(folder, published_config(), shards=60, headers_only=True)


def test_micro_checkpoint_holds_the_inventory(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(micro_checkpoint(tmp_path, shards=3))
    checkpoint.check(inventory(checkpoint.config))
    assert [shard.name for shard in checkpoint.shards] == [
        f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)
    ]


def test_safetensors_reads_the_same_values(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(micro_checkpoint(tmp_path, shards=2))
    for shard in checkpoint.shards:
        with safe_open(shard, "pt") as file:
            for name in file.keys():  # noqa: SIM118 -- not a dictionary
                expected = file.get_tensor(name).float().numpy()
                np.testing.assert_array_equal(checkpoint.read(name), expected)


def test_weights_are_normal_and_follow_the_seed(tmp_path: Path) -> None:
    name = "model.embed_tokens.weight"
    one, same, other = (
        Checkpoint.open(micro_checkpoint(tmp_path / folder, shards, seed)).read(name)
        for folder, shards, seed in (("one", 1, 5), ("same", 3, 5), ("other", 1, 6))
    )
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)
    assert one.std() == pytest.approx(0.02, rel=0.03)
    assert abs(one.mean()) < 0.001


def test_full_geometry_is_sparse(full: Path) -> None:
    checkpoint = Checkpoint.open(full)
    checkpoint.check(inventory(checkpoint.config))
    assert checkpoint.config.num_hidden_layers == 62
    assert len(checkpoint.shards) == 60
    sizes = [shard.stat() for shard in checkpoint.shards]
    assert sum(size.st_size for size in sizes) == pytest.approx(286e9, rel=0.005)
    assert sum(size.st_blocks * 512 for size in sizes) < 20e6
    index = json.loads((full / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == pytest.approx(286e9, rel=0.005)


def test_full_vocabulary_is_a_valid_bpe(full: Path) -> None:
    tokenizer = Tokenizer.from_file(str(full / "tokenizer.json"))
    assert tokenizer.token_to_id("<|endoftext|>") == 151643
    assert tokenizer.token_to_id("<|endofresponse|>") == 151649
    text = "It's 1408 wide, 不是 256 的倍数\n\n<|endofresponse|>"
    ids = tokenizer.encode(text).ids
    assert ids[-1] == 151649
    assert len(ids) < len(text.encode()) * 0.8
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    model = json.loads((full / "tokenizer.json").read_text())["model"]
    assert len(model["vocab"]) == 151643
    assert all(left + right in model["vocab"] for left, right in model["merges"])


def test_vocabulary_smaller_than_the_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="272 rows"):
        micro_checkpoint(tmp_path, vocab_size=256)
