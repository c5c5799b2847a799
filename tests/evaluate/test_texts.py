import json
from pathlib import Path

from tokenizers import Tokenizer

from dots1_local.evaluate.texts import open_vocabulary, tokenize
from dots1_local.files.checkpoint import Checkpoint
from tests.micro import micro_checkpoint


def test_tokens_are_those_of_the_tokenizer(tiny: Path) -> None:
    content = (tiny / "heldout.txt").read_text(encoding="utf-8").removesuffix("\n")
    expected = Tokenizer.from_file(str(tiny / "tokenizer.json")).encode(content).ids
    checkpoint = Checkpoint.open(tiny)
    with open_vocabulary(checkpoint) as vocabulary:
        chunks = tokenize(checkpoint, vocabulary, 512, [tiny / "heldout.txt"], [], None)
    assert chunks.ravel().tolist() == expected[: len(expected) // 512 * 512]


def test_conversations_have_the_special_tokens_of_the_template_only(
    tiny: Path, tmp_path: Path
) -> None:
    tokenizer = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    path = tmp_path / "chat.jsonl"
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who is <|endofresponse|>?"},
        {"role": "assistant", "content": "Nobody."},
    ]
    path.write_text((json.dumps({"messages": messages}) + "\n\n") * 9)
    checkpoint = Checkpoint.open(tiny)
    with open_vocabulary(checkpoint) as vocabulary:
        tokens = tokenize(checkpoint, vocabulary, 16, [], [path], None).ravel().tolist()
    end = tokens.index(checkpoint.raw_config["eos_token_id"])
    rendered = tokenizer.decode(tokens[: end + 1], skip_special_tokens=False)
    assert rendered == (
        "<|system|>Be brief.<|endofsystem|><|userprompt|>Who is <|endofresponse|>?"
        "<|endofuserprompt|><|response|>Nobody.<|endofresponse|>"
    )


def test_lines_of_conversations_end_at_newlines_only(tmp_path: Path) -> None:
    """U+2028 and the like, which JSON strings may contain, do not end a line."""
    path = tmp_path / "chat.jsonl"
    messages = [{"role": "user", "content": "a\u2028b\x85c"}, {"role": "assistant", "content": "d"}]
    line = json.dumps({"messages": messages}, ensure_ascii=False)
    path.write_text(f"{line}\r\n" * 9, encoding="utf-8", newline="")
    checkpoint = Checkpoint.open(micro_checkpoint(tmp_path / "hf"))
    with open_vocabulary(checkpoint) as vocabulary:
        assert len(tokenize(checkpoint, vocabulary, 16, [], [path], None))
