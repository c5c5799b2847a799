"""Files with wrong keys run as they are, exactly like the copy that `verify --fix` writes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dots1_local.chat.message import Message
from dots1_local.chat.prompt import Prompter
from dots1_local.chat.sampling import Sampling
from dots1_local.chat.session import Session
from dots1_local.engine.engine import Engine, Vocabulary
from dots1_local.engine.planned import load
from dots1_local.errors import GGUFError
from dots1_local.verify import verify_gguf
from dots1_local.verify.fix import write_fixed
from tests.conftest import Converted
from tests.helpers import EOS, TOKENS, all_logits, scripted_tensors, tokens_of, write_random_gguf
from tests.verify.defects import FIXABLE, as_types
from tests.verify.patch import rewrite

# llama.cpp looks for these in the file, whatever is overridden.
NEEDS_A_COPY = ("dots1.feed_forward_length", "dots1.attention.head_count")
MENDED = [change for change, *_ in FIXABLE if change.get("remove", [""])[0] not in NEEDS_A_COPY]
PRE = "tokenizer.ggml.pre"
TEXT = 'He said: "don\'t!"\n\n  Then,\n she\'LL go ("home").\n\n\nWe\'re 1234567 cats...\n' * 2
MESSAGES = [
    Message("system", "Be <|response|> brief."),
    Message("user", "Why, he said, is the sky blue?"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_gguf(tmp_path_factory.mktemp("good") / "model.gguf")


def behaviour(path: Path) -> tuple[list[int], Any, list[int], list[bytes], str]:
    """A prompt, its logits, the tokens that end an answer, the tokens' texts, and an answer."""
    with Engine.open(path, n_ctx=256, threads=1, all_logits=True) as engine:
        prompt = Prompter(engine).tokens(MESSAGES)
        logits = all_logits(engine, prompt)
        engine.forget()
        ends = [token for token in range(engine.n_vocab) if engine.is_end(token)]
        pieces = [engine.piece(token) for token in range(engine.n_vocab)]
        with Session(engine, sampling=Sampling(temperature=0)) as session:
            session.max_tokens = 12
            return prompt, logits, ends, pieces, "".join(session.ask("Why, he said?"))


@pytest.mark.parametrize("change", MENDED, ids=lambda change: str(change)[:60])
def test_a_file_with_wrong_keys_runs_like_the_fixed_copy(
    model: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    path = rewrite(model, tmp_path / "elsewhere.gguf", **change)
    before = path.read_bytes()
    (fixed,) = write_fixed(verify_gguf(path, quick=True), tmp_path / "fixed.gguf")
    with Engine.open(fixed, n_ctx=64, threads=1) as engine:
        assert engine.warnings == ()  # the copy needs no correction
    prompt, logits, ends, pieces, answer = behaviour(path)
    right = behaviour(fixed)
    assert prompt == right[0]
    np.testing.assert_array_equal(logits, right[1])
    if change.get("values", {}).get("tokenizer.ggml.token_type") != as_types(system=4):
        assert pieces == right[3]  # user-defined tokens are shown, as they are in every file
    assert (ends, answer) == (right[2], right[4])
    assert path.read_bytes() == before


@pytest.mark.parametrize("key", NEEDS_A_COPY)
def test_what_llama_cpp_cannot_be_told_needs_a_copy(model: Path, tmp_path: Path, key: str) -> None:
    path = rewrite(model, tmp_path / "elsewhere.gguf", remove=[key])
    with pytest.raises(GGUFError, match=rf"{key} is missing.*--fix sets"):
        Engine.open(path, n_ctx=64, threads=1)


def test_every_shard_of_a_split_file_stays_as_it_is(tmp_path: Path) -> None:
    """Public files begin prompts with a comma, lack the gating function, and end at a comma."""
    answer = scripted_tensors([*tokens_of("fin, bo"), EOS])
    write_random_gguf(
        tmp_path / "model.gguf",
        tensors=answer,
        shard_tensors=12,
        without=["eos_token_id"],
        gating=1,
    )
    shard = min(tmp_path.iterdir())
    said: list[str] = []
    with load(shard, n_ctx=256, threads=1, notify=said.append) as engine, Session(engine) as chat:
        assert "".join(chat.ask("How are you?")) == "fin, bo"
    (sentence,) = said
    assert "in memory" in sentence
    assert "expert_gating_func 2" in sentence
    assert f"eos_token_id {EOS}" in sentence
    assert sentence.isprintable()


def test_an_end_beyond_an_unknown_vocabulary_is_not_a_comma(tmp_path: Path) -> None:
    """No token has a known end's name, so that nothing certain can be set."""
    names = [token.replace("<|endof", "<|finof") for token in TOKENS]
    answer = scripted_tensors([*tokens_of("fin, bo"), EOS])
    right = write_random_gguf(tmp_path / "right.gguf", tokens=names, tensors=answer)
    path = rewrite(right, tmp_path / "wrong.gguf", {"tokenizer.ggml.eos_token_id": 99999})
    with Engine.open(path, n_ctx=256, threads=1) as engine:
        assert not engine.is_end(11)


def test_the_tokeniser_alone_is_corrected_too(model: Path, tmp_path: Path) -> None:
    key = "tokenizer.ggml.add_bos_token"
    path = rewrite(model, tmp_path / "elsewhere.gguf", {key: True})
    with Vocabulary.load(path) as found, Vocabulary.load(model) as right:
        assert found.bos is None
        for text in ("He said, why", "it's 2026"):
            tokens = found.tokenize(text, special=False, add_bos=True)
            assert tokens == right.tokenize(text, special=False, add_bos=True)


@pytest.mark.parametrize("change", [{"values": {PRE: "falcon"}}, {"remove": [PRE]}])
def test_text_is_split_as_in_training(
    converted: Converted, tmp_path: Path, change: dict[str, Any]
) -> None:
    """Merges of the example cross the places where other pre-tokenisers split."""
    path = rewrite(converted("DQ4"), tmp_path / "elsewhere.gguf", **change)
    with Vocabulary.load(path) as found, Vocabulary.load(converted("DQ4")) as right:
        wanted = right.tokenize(TEXT, special=False)
        assert found.tokenize(TEXT, special=False) == wanted
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dots1_local.engine.vocabulary.corrected", lambda gguf: gguf)
        with Vocabulary.load(path) as wrong:
            assert wrong.tokenize(TEXT, special=False) != wanted
