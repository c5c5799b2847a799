"""The text for dots1-tiny: training and held-out parts, the tokenizer, and windows of tokens.

All depend on the files and a seed only, so that a resumed run gets the same text.
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
# The pre-tokeniser of Qwen2, which dots.llm1 uses.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

Tokens = NDArray[np.int64]
"""One row of tokens, or rows [n, length + 1]; the target of a token is the one after it."""


@dataclass(frozen=True)
class Corpus:
    """Training documents and one held-out text for each kind."""

    train: dict[str, list[str]]
    heldout: dict[str, str]

    @property
    def train_bytes(self) -> dict[str, int]:
        return {kind: sum(len(t.encode()) for t in texts) for kind, texts in self.train.items()}


def read_corpus(files: Mapping[str, Sequence[Path]], heldout_share: float) -> Corpus:
    """Read the files of each kind; the end of every file is held out."""
    train: dict[str, list[str]] = {}
    heldout: dict[str, str] = {}
    for kind, paths in files.items():
        pairs = [_cut(path.read_bytes().decode(), heldout_share) for path in paths]
        texts = (text for text, _ in pairs)
        train[kind] = [doc.strip() for text in texts for doc in text.split(END_OF_TEXT)]
        heldout[kind] = "\n\n".join(_plain(text) for _, text in pairs) + "\n"
    return Corpus(train, heldout)


def _cut(text: str, share: float) -> tuple[str, str]:
    """Split off the last `share` of a text, between stories if it has any, or paragraphs."""
    text = text.replace("\r\n", "\n")
    border = END_OF_TEXT if END_OF_TEXT in text else "\n\n"
    start = int(len(text) * (1 - share))
    at = text.find(border, start)
    return (text[:at], text[at + len(border) :]) if at > 0 else (text[:start], text[start:])


def beginnings(files: Mapping[str, Sequence[Path]], size: int = 60_000) -> str:
    """The first `size` bytes of every file, for calibration; they contain no held-out text."""
    texts = [
        path.read_bytes()[:size].decode(errors="ignore").replace("\r", "")
        for paths in files.values()
        for path in paths
    ]
    return "".join(f"{text}\n" for text in texts).replace(END_OF_TEXT, "")


def _plain(text: str) -> str:
    return re.sub(r"\s*<\|endoftext\|>\s*", "\n\n", text).strip()


def train_tokenizer(corpus: Corpus, tokens: int) -> Tokenizer:
    """A byte-level BPE with `tokens` tokens, including the special ones, which come last."""
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
    """One row with the tokens of all texts, each followed by the end-of-text token."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    pieces = tokenizer.encode_batch(list(texts))
    return np.concatenate([np.array([*piece.ids, end], np.int64) for piece in pieces])


def windows(tokens: Tokens, length: int, seed: int) -> Tokens:
    """One epoch over `tokens` in shuffled rows [n, length + 1]; the seed shifts their starts."""
    rng = np.random.default_rng(seed)
    shifted = np.roll(tokens, -int(rng.integers(length)))
    count = (len(shifted) - 1) // length
    starts = rng.permutation(count) * length
    return np.stack([shifted[start : start + length + 1] for start in starts])


def in_order(tokens: Tokens, length: int) -> Tokens:
    """The tokens in order, in rows [n, length + 1]; an incomplete last row is left out."""
    starts = range(0, len(tokens) - length, length)
    return np.stack([tokens[start : start + length + 1] for start in starts])
