"""The exported tokenizer gives the same ids as the tokenizer that was converted."""

import json
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader, TokenType
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer
from typer.testing import CliRunner

from dots1_local.cli import app
from dots1_local.convert.tokenizer import read_tokenizer
from dots1_local.export import Export, export_checkpoint
from tests.conftest import Converted
from tests.helpers import EOS, TOKENS, TYPES, write_random_gguf
from tests.verify.patch import rewrite

PRE, MERGES = "tokenizer.ggml.pre", "tokenizer.ggml.merges"
TEXTS = [
    "你好，世界！话说天下大势，分久必合，合久必分。",
    "👍🏽 emoji 👩‍👩‍👧, é and e\u0301, ﬁ, ½, Ⅳ, İ, ß",
    "def f(x):\n\treturn  x**2  # it's\r\n\r\n    if x != 0x1F:\n",
    "   a  b\n\n\n c   \t\n ",
    "1234567.89 IT'S we'll I'D \x00\x7f\u200b\ufeff",
    "<|system|>hi<|endofsystem|><|userprompt|> x <|endofuserprompt|><|response|>",
    "<|system |> <|nothing|> [PAD3999] <|endofresponse|>\n<|endoftext|>",
]


@pytest.fixture(scope="module")
def tokenizers(
    tiny: Path, converted: Converted, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Any]:
    """The original and the exported tokenizer, as transformers loads them."""
    folder = tmp_path_factory.mktemp("tokenizer") / "out"
    export_checkpoint(converted("Q8_0"), folder)
    return AutoTokenizer.from_pretrained(tiny), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", TEXTS)
def test_same_ids_and_back(tokenizers: tuple[Any, Any], text: str) -> None:
    original, exported = tokenizers
    ids = original(text).input_ids
    assert exported(text).input_ids == ids
    assert exported.decode(ids) == original.decode(ids)
    assert exported.decode(ids, skip_special_tokens=True) == original.decode(
        ids, skip_special_tokens=True
    )


def test_same_ids_of_a_long_text(tokenizers: tuple[Any, Any], tiny: Path) -> None:
    original, exported = tokenizers
    for line in (tiny / "heldout.txt").read_text(encoding="utf-8").split("\n\n"):
        assert exported(line).input_ids == original(line).input_ids


@given(st.text(max_size=40))
def test_same_ids_of_any_text(tokenizers: tuple[Any, Any], text: str) -> None:
    original, exported = tokenizers
    assert exported(text).input_ids == original(text).input_ids


def test_same_chat_and_same_special_tokens(tokenizers: tuple[Any, Any]) -> None:
    original, exported = tokenizers
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    prompts = [
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        for tokenizer in tokenizers
    ]
    assert prompts[0] == prompts[1]
    assert exported.special_tokens_map == original.special_tokens_map
    assert len(exported) == len(original)
    assert exported.model_max_length == original.model_max_length


def test_rows_without_a_token_and_tokens_in_between_keep_their_ids(tmp_path: Path) -> None:
    """Control tokens need not come last in other people's files."""
    types = list(TYPES)
    system, last = TOKENS.index("<|system|>"), len(TOKENS) - 1
    types[0], types[1] = TokenType.CONTROL, TokenType.UNUSED
    types[system] = TokenType.USER_DEFINED
    path = write_random_gguf(tmp_path / "m.gguf", types=types)
    export_checkpoint(path, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    kept = {token: index for index, token in enumerate(TOKENS) if index not in (1, last)}
    assert tokenizer.get_vocab() == kept
    ids = [TOKENS.index("hello"), system, ord("!"), EOS]
    assert tokenizer("hello<|system|>!<|endofresponse|>").input_ids == ids
    assert tokenizer.decode([0, *ids], skip_special_tokens=True) == "hello<|system|>!"


def test_converting_again_gives_the_same_keys(
    tiny: Path, converted: Converted, tmp_path: Path
) -> None:
    export_checkpoint(converted("Q8_0"), tmp_path / "out")
    original, again = (read_tokenizer(folder, 4096, []) for folder in (tiny, tmp_path / "out"))
    assert original == again


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({PRE: "llama-bpe"}, "pre is 'llama-bpe', not 'qwen2'"),
        ({MERGES: ["h e", "zz yy"]}, "the merge 'zz yy'"),
        ({MERGES: ["h e", "hello"]}, "the merge 'hello'"),
        ({"tokenizer.ggml.add_bos_token": True}, "adds a token to every text"),
    ],
)
def test_a_tokenizer_that_would_split_otherwise_is_left_out(
    tmp_path: Path, values: dict[str, Any], says: str
) -> None:
    path = write_random_gguf(tmp_path / "m.gguf")
    other = rewrite(path, tmp_path / "other.gguf", values)
    result = CliRunner().invoke(app, ["export", str(other), "-o", str(tmp_path / "out")])
    assert result.exit_code == 0
    assert "tokenizer.json is left out" in result.stderr
    assert says in result.stderr
    assert not list((tmp_path / "out").glob("tokenizer*"))
    assert (tmp_path / "out" / "config.json").exists()


def test_a_file_without_a_template_exports_none(tmp_path: Path) -> None:
    export_checkpoint(write_random_gguf(tmp_path / "m.gguf", template=None), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert "chat_template" not in config


@pytest.mark.parametrize(
    ("key", "value", "ends"),
    [
        ("tokenizer.ggml.eot_token_id", 5000, [EOS]),
        ("tokenizer.ggml.eot_token_id", EOS, [EOS]),
        ("tokenizer.ggml.eos_token_id", len(TOKENS) - 1, [TOKENS.index("<|endoftext|>")]),
    ],
)
def test_end_ids_that_are_not_tokens_are_left_out(
    tmp_path: Path, key: str, value: int, ends: list[int]
) -> None:
    path = rewrite(write_random_gguf(tmp_path / "m.gguf"), tmp_path / "n.gguf", {key: value})
    assert GGUFReader(path).fields[key].contents() == value
    documents = Export.prepare(path).documents
    assert json.loads(documents["generation_config.json"])["eos_token_id"] == ends
    assert json.loads(documents["config.json"])["eos_token_id"] == ends[0]


def test_a_file_without_ends_says_so(tmp_path: Path) -> None:
    path = write_random_gguf(tmp_path / "m.gguf", without=["eos_token_id"])
    export = Export.prepare(
        rewrite(path, tmp_path / "n.gguf", remove=["tokenizer.ggml.eot_token_id"])
    )
    assert "names no token that ends a response" in export.notices[0]
    assert "generation_config.json" not in export.documents
