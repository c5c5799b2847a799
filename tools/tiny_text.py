"""The text dots1-tiny learns: what is held out, its tokenizer, and windows of tokens.

Everything is a function of the files and a seed, so that a resumed run sees the same text.
"""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from tokenizers import pre_tokenizers as pre
from tokenizers.trainers import BpeTrainer

__all__ = [
    "END_OF_TEXT",
    "KINDS",
    "SPECIAL",
    "Corpus",
    "chat_rows",
    "encode",
    "in_order",
    "read_corpus",
    "train_tokenizer",
    "windows",
]

KINDS = ("english", "chinese", "stories")
END_OF_TEXT = "<|endoftext|>"
SPECIAL = (
    END_OF_TEXT,
    "<|userprompt|>", "<|endofuserprompt|>",
    "<|response|>", "<|endofresponse|>",
    "<|system|>", "<|endofsystem|>",
    "<|observation|>", "<|endofobservation|>",
)  # fmt: skip
# Qwen2's, which dots.llm1 uses.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

Tokens = NDArray[np.int64]


@dataclass(frozen=True)
class Corpus:
    """Documents to train on and one held-out text, each per kind."""

    train: dict[str, list[str]]
    heldout: dict[str, str]

    @property
    def train_bytes(self) -> dict[str, int]:
        return {kind: sum(len(t.encode()) for t in texts) for kind, texts in self.train.items()}


def read_corpus(files: dict[str, Sequence[Path]], heldout_share: float) -> Corpus:
    """Read the files of each kind, and cut the end of every file off as held-out text."""
    train: dict[str, list[str]] = {}
    heldout: dict[str, str] = {}
    for kind, paths in files.items():
        pairs = [_cut(path.read_bytes().decode(), heldout_share) for path in paths]
        texts = (text for text, _ in pairs)
        train[kind] = [doc.strip() for text in texts for doc in text.split(END_OF_TEXT)]
        heldout[kind] = "\n\n".join(_plain(text) for _, text in pairs) + "\n"
    return Corpus(train, heldout)


def _cut(text: str, share: float) -> tuple[str, str]:
    """Text and its last `share` in bytes, cut between paragraphs, or stories where there are any."""
    text = text.replace("\r\n", "\n")
    border = END_OF_TEXT if END_OF_TEXT in text else "\n\n"
    start = int(len(text) * (1 - share))
    at = text.find(border, start)
    return (text[:at], text[at + len(border) :]) if at > 0 else (text[:start], text[start:])


def _plain(text: str) -> str:
    return re.sub(r"\s*<\|endoftext\|>\s*", "\n\n", text).strip()


def train_tokenizer(corpus: Corpus, tokens: int) -> Tokenizer:
    """A byte-level BPE of `tokens` tokens in all, the special ones last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre.Sequence(
        [
            pre.Split(Regex(_SPLIT), "isolated"),
            pre.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel(
        add_prefix_space=False, trim_offsets=False, use_regex=False
    )
    trainer = BpeTrainer(
        vocab_size=tokens - len(SPECIAL),
        initial_alphabet=pre.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((t for ts in corpus.train.values() for t in ts), trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> Tokens:
    """The texts in one row of tokens, each followed by the end-of-text token."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    pieces = tokenizer.encode_batch(list(texts))
    return np.concatenate([np.array([*piece.ids, end], np.int64) for piece in pieces])


def windows(tokens: Tokens, length: int, seed: int) -> Tokens:
    """[n, length + 1]: one epoch over `tokens`, cut at other places for every seed, shuffled."""
    rng = np.random.default_rng(seed)
    shifted = np.roll(tokens, -int(rng.integers(length)))
    count = (len(shifted) - 1) // length
    starts = rng.permutation(count) * length
    return np.stack([shifted[start : start + length + 1] for start in starts])


def in_order(tokens: Tokens, length: int) -> Tokens:
    """[n, length + 1]: the tokens from first to last, less what does not fill a row."""
    starts = range(0, len(tokens) - length, length)
    return np.stack([tokens[start : start + length + 1] for start in starts])


def chat_rows(
    tokenizer: Tokenizer, stories: Sequence[str], plain: Tokens, length: int, seed: int
) -> Tokens:
    """[n, length + 1]: rows of whole conversations about the stories, every fifth of plain text."""
    rng = random.Random(seed)
    chats = [chat for story in rng.sample(stories, len(stories)) for chat in _chats(story, rng)]
    rows = list(_pack((piece.ids for piece in tokenizer.encode_batch(chats)), length + 1))
    rows += list(windows(plain, length, seed)[: len(rows) // 4])
    order = np.random.default_rng(seed).permutation(len(rows))
    return np.stack(rows)[order]


def _pack(documents: Iterator[list[int]], length: int) -> Iterator[Tokens]:
    """Rows that start where a document starts; what goes beyond a row's end is lost."""
    row: list[int] = []
    for document in documents:
        row += document
        if len(row) >= length:
            yield np.array(row[:length], np.int64)
            row = []


_SYSTEMS = (
    "You are a helpful assistant.", "You are a helpful assistant.", "You are a helpful assistant.",
    "You tell short stories to children.", "You are a kind storyteller.", "Answer briefly.",
)  # fmt: skip
_ABOUT = (
    "Tell me a story about {}.", "Write a short story about {}.", "Tell me a short story about {}.",
    "Can you tell me a story about {}?", "I would like a story about {}.", "Write a story about {}.",
)  # fmt: skip
_HERO = re.compile(r"\b(?:a|an) ((?:[a-z]+ ){0,2}[a-z]+?)(?= named| called| who|[.,!])")
_MOST_LETTERS = 800  # of an answer: about 200 tokens, so that its end is often seen


def _chats(story: str, rng: random.Random) -> Iterator[str]:
    """Conversations made from one story, in dots.llm1's prompt format."""
    story = re.sub(r"[ \t]*\n\s*", "\n\n", story.strip())
    sentences = re.findall(r".+?[.!?][\"”’']?(?:\s+|$)", story, re.DOTALL)
    if len(sentences) < 3:
        return
    hero = _HERO.search(story.replace("upon a time", ""))
    about = f"{_article(hero[1])} {hero[1]}" if hero else _name(story) or "a child"
    ending = story if len(story) <= _MOST_LETTERS else _shortened(sentences)
    yield _chat(rng.choice(_ABOUT).format(about), ending, rng)
    first = sentences[0].strip()
    rest = _shortened(sentences[1:])
    yield _chat(f"Continue this story: {first}", rest, rng)
    if hero:
        yield _chat(f"What is the story about {about}?", _shortened(sentences[:5]), rng)


def _shortened(sentences: Sequence[str]) -> str:
    """As many whole sentences as an answer may have, keeping the last one, the story's end."""
    room = _MOST_LETTERS - len(sentences[-1])
    kept: list[str] = []
    for sentence in sentences[:-1]:
        room -= len(sentence)
        if room < 0:
            break
        kept.append(sentence)
    return "".join([*kept, sentences[-1]]).strip()


def _article(noun: str) -> str:
    return "an" if noun[0] in "aeiou" else "a"


def _name(story: str) -> str | None:
    found = re.search(r"named ([A-Z][a-z]+)", story)
    return found[1] if found else None


def _chat(user: str, answer: str, rng: random.Random) -> str:
    system = f"<|system|>{rng.choice(_SYSTEMS)}<|endofsystem|>" if rng.random() < 0.7 else ""
    return (
        f"{system}<|userprompt|>{user}<|endofuserprompt|><|response|>{answer}<|endofresponse|>"
        + END_OF_TEXT
    )
