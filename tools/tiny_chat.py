"""Conversations made from stories; they teach dots1-tiny to answer and to stop."""

import random
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from tokenizers import Tokenizer

from tools.tiny_text import END_OF_TEXT, Tokens, windows

__all__ = ["chat_rows", "chats"]

_SYSTEMS = (
    "You are a helpful assistant.", "You are a helpful assistant.", "You are a helpful assistant.",
    "You tell short stories to children.", "You are a kind storyteller.", "Answer briefly.",
)  # fmt: skip
_ABOUT = (
    "Tell me a story about {}.",
    "Write a short story about {}.",
    "Tell me a short story about {}.",
    "Can you tell me a story about {}?",
    "I would like a story about {}.",
    "Write a story about {}.",
)
_HERO = re.compile(r"\b(?:a|an) ((?:[a-z]+ ){0,2}[a-z]+?)(?= named| called| who|[.,!])")
_SENTENCE = re.compile(r".+?[.!?][\"”’']?(?:\s+|$)", re.DOTALL)
_MOST_LETTERS = 800  # in an answer: about 200 tokens, so that many rows contain its end


def chat_rows(
    tokenizer: Tokenizer, stories: Sequence[str], plain: Tokens, length: int, seed: int
) -> Tokens:
    """Rows [n, length + 1] of whole conversations about the stories; a third is plain text."""
    rng = random.Random(seed)
    texts = [chat for story in rng.sample(stories, len(stories)) for chat in chats(story, rng)]
    rows = list(_pack((piece.ids for piece in tokenizer.encode_batch(texts)), length + 1))
    rows += list(windows(plain, length, seed)[: len(rows) // 2])
    order = np.random.default_rng(seed).permutation(len(rows))
    return np.stack(rows)[order]


def _pack(documents: Iterable[list[int]], length: int) -> Iterator[Tokens]:
    """Rows that start with a document; what does not fit into the row is dropped."""
    row: list[int] = []
    for document in documents:
        row += document
        if len(row) >= length:
            yield np.array(row[:length], np.int64)
            row = []


def chats(story: str, rng: random.Random) -> Iterator[str]:
    """Conversations made from one story, in dots.llm1's prompt format."""
    story = re.sub(r"[ \t]*\n\s*", "\n\n", story.strip())
    sentences = _SENTENCE.findall(story)
    if len(sentences) < 3:
        return
    hero = _HERO.search(story.replace("upon a time", ""))
    about = f"{_article(hero[1])} {hero[1]}" if hero else _name(story) or "a child"
    yield _chat(rng.choice(_ABOUT).format(about), _shortened(sentences), rng)
    first, rest = sentences[0].strip(), _shortened(sentences[1:])
    yield _chat(f"Continue this story: {first}", rest, rng)
    if hero:
        yield _chat(f"What is the story about {about}?", _shortened(sentences[:5]), rng)


def _shortened(sentences: Sequence[str]) -> str:
    """The first sentences that fit into an answer, and the last one, which ends the story."""
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
