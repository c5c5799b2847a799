"""Messages to prompt tokens, in the format of the model's own chat template, or in none.

Only the template's own text can become special tokens: "<|endofresponse|>" typed by a person
stays text. So the template is rendered with a placeholder for each message, and the pieces between
placeholders are tokenised apart from what people wrote.
"""

import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from dots1_local.chat_template import ChatTemplate
from dots1_local.errors import GGUFError
from dots1_local.runtime.engine import Engine
from dots1_local.runtime.vocabulary import Vocabulary

__all__ = ["Message", "Prompter", "RawPrompter"]

_USER_DEFINED = 4  # enum llama_token_type
_REPEATS = 8  # a template may write each message so often, on average


@dataclass(frozen=True)
class Message:
    """One turn; `tokens` are those the model itself wrote, which text may not reproduce."""

    role: Literal["system", "user", "assistant"]
    text: str
    tokens: tuple[int, ...] | None = None


class RawPrompter:
    """The tokeniser of one model, without a template: messages make up one document."""

    def __init__(self, engine: Engine | Vocabulary) -> None:
        self._engine = engine
        source = engine.gguf.keys.get("tokenizer.chat_template")
        self._source = source if isinstance(source, str) else None

    def tokens(self, messages: Sequence[Message]) -> list[int]:
        """The texts one after another; the document begins with BOS if the model's do."""
        tokens = [] if self._engine.bos is None else [self._engine.bos]
        for message in messages:
            tokens += self.content(message)
        return tokens

    def content(self, message: Message) -> list[int]:
        """The tokens of one message's text, none of them special."""
        if message.tokens is not None:
            return list(message.tokens)
        parts = self._harmless(message.text)
        return [token for part in parts for token in self._engine.tokenize(part, special=False)]

    def _harmless(self, text: str) -> Iterator[str]:
        """`text` cut inside whatever would be read as a marker.

        llama.cpp keeps control tokens out of plain text, but not the added tokens that a tokenizer
        does not call special, and the markers of a chat may be among those.
        """
        start = 0
        for match in self._markers.finditer(text) if self._markers else ():
            yield text[start : match.start() + 1]
            start = match.start() + 1
        yield text[start:]

    @cached_property
    def _markers(self) -> re.Pattern[str] | None:
        """The template's markers among the user-defined tokens."""
        keys = self._engine.gguf.keys
        tokens, types = keys.get("tokenizer.ggml.tokens"), keys.get("tokenizer.ggml.token_type")
        if not isinstance(tokens, list) or not isinstance(types, list):
            return None
        names = [
            str(token)
            for token, kind in zip(tokens, types, strict=False)
            if kind == _USER_DEFINED and str(token) in (self._source or "")
        ]
        # Only looked ahead to, so that of markers that overlap each is found.
        return re.compile(f"(?={'|'.join(map(re.escape, names))})") if names else None


class Prompter(RawPrompter):
    """The chat template and the tokeniser of one model; `name` is what errors call it.

    Raises:
        GGUFError: the file has no chat template, or one that does not parse.
    """

    def __init__(self, engine: Engine | Vocabulary, name: str | None = None) -> None:
        super().__init__(engine)
        self._file = name or str(engine.gguf.files[0])
        if self._source is None:
            raise GGUFError(
                f"{self._file} has no chat template; it is a base model, whose texts --raw "
                "completes, or was converted without tokenizer_config.json"
            )
        self._template = ChatTemplate(self._source, self._file)

    def tokens(self, messages: Sequence[Message]) -> list[int]:
        """The prompt that makes the model write the next assistant message.

        Raises:
            GGUFError: the template fails on these messages, garbles them or leaves the last out.
        """
        mark = secrets.token_hex(8)
        names = [f"{mark}.{index}." for index in range(len(messages))]
        rendered = self._template.render(
            [{"role": m.role, "content": name} for m, name in zip(messages, names, strict=True)],
            bos_token=self._special("bos"),
            eos_token=self._special("eos"),
        )
        if names[-1] not in rendered:
            raise GGUFError(f"the chat template of {self._file} leaves out the last message")
        pieces = re.split(rf"{mark}\.(\d{{1,9}})\.", rendered)
        indices = [int(index) for index in pieces[1::2]]
        if len(indices) > _REPEATS * len(messages) or max(indices) >= len(messages):
            raise GGUFError(f"the chat template of {self._file} garbles the messages")
        tokens = self._engine.tokenize(pieces[0], special=True)
        for index, literal in zip(indices, pieces[2::2], strict=True):
            tokens += self.content(messages[index])
            tokens += self._engine.tokenize(literal, special=True)
        return tokens

    def _special(self, name: str) -> str:
        """What a template that writes `eos_token` or the like means by it."""
        keys = self._engine.gguf.keys
        names, token = (keys.get(f"tokenizer.ggml.{key}") for key in ("tokens", f"{name}_token_id"))
        if isinstance(names, list) and isinstance(token, int) and 0 <= token < len(names):
            return str(names[token])
        return ""
