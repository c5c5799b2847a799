"""The text dots1-tiny learns: what is held out, the tokenizer made from the rest, and windows.

Everything is a function of the files and a seed, so that a resumed run sees the same text.
"""

import re
from collections.abc import Mapping, Sequence
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
    "Tokens",
    "beginnings",
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
"""Either one row of tokens, or rows of [length + 1]: the inputs and, one later, their targets."""


@dataclass(frozen=True)
class Corpus:
    """Documents to train on and one held-out text, each per kind."""

    train: dict[str, list[str]]
    heldout: dict[str, str]

    @property
    def train_bytes(self) -> dict[str, int]:
        return {kind: sum(len(t.encode()) for t in texts) for kind, texts in self.train.items()}


def read_corpus(files: Mapping[str, Sequence[Path]], heldout_share: float) -> Corpus:
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
    """Text and its last `share`, cut between paragraphs, or between stories where there are any."""
    text = text.replace("\r\n", "\n")
    border = END_OF_TEXT if END_OF_TEXT in text else "\n\n"
    start = int(len(text) * (1 - share))
    at = text.find(border, start)
    return (text[:at], text[at + len(border) :]) if at > 0 else (text[:start], text[start:])


def beginnings(files: Mapping[str, Sequence[Path]], size: int = 60_000) -> str:
    """The first `size` bytes of every file: text to calibrate on, and none of what is held out."""
    texts = [
        path.read_bytes()[:size].decode(errors="ignore").replace("\r", "")
        for paths in files.values()
        for path in paths
    ]
    return "".join(f"{text}\n" for text in texts).replace(END_OF_TEXT, "")


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
    tokenizer.decoder = decoders.ByteLevel()
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
