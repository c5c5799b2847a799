"""Messages to prompt tokens, in the format of the model's own chat template.

Only the template's own text can become special tokens: "<|endofresponse|>" typed by a person
stays text. So the template is rendered with a placeholder for each message, and the pieces between
placeholders are tokenised apart from what people wrote.
"""

import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NoReturn

from dots1_local.errors import GGUFError
from dots1_local.runtime.engine import Engine

__all__ = ["Message", "Prompter"]

_CONTROL, _USER_DEFINED = 3, 4  # enum llama_token_type


@dataclass(frozen=True)
class Message:
    """One turn; `tokens` are those the model itself wrote, which text may not reproduce."""

    role: Literal["system", "user", "assistant"]
    text: str
    tokens: tuple[int, ...] | None = None


class Prompter:
    """The chat template and the tokeniser of one model.

    Raises:
        GGUFError: the file has no chat template, or one that does not parse.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._file = engine.gguf.files[0]
        source = engine.gguf.keys.get("tokenizer.chat_template")
        if not isinstance(source, str):
            raise GGUFError(
                f"{self._file} has no chat template; it is a base model or was converted without "
                "tokenizer_config.json"
            )
        self._source = source
        self._template = _compile(source, str(self._file))

    def tokens(self, messages: Sequence[Message]) -> list[int]:
        """The prompt that makes the model write the next assistant message.

        Raises:
            GGUFError: the template fails on these messages or leaves the last of them out.
        """
        mark = secrets.token_hex(8)
        names = [f"{mark}.{index}." for index in range(len(messages))]
        rendered = self._render(
            [{"role": m.role, "content": name} for m, name in zip(messages, names, strict=True)]
        )
        if names[-1] not in rendered:
            raise GGUFError(f"the chat template of {self._file} leaves out the last message")
        pieces = re.split(rf"{mark}\.(\d+)\.", rendered)
        tokens = self._engine.tokenize(pieces[0], special=True)
        for index, literal in zip(pieces[1::2], pieces[2::2], strict=True):
            tokens += self._content(messages[int(index)])
            tokens += self._engine.tokenize(literal, special=True)
        return tokens

    def _content(self, message: Message) -> list[int]:
        if message.tokens is not None:
            return list(message.tokens)
        return [token for part in self._harmless(message.text) for token in self._plain(part)]

    def _plain(self, text: str) -> list[int]:
        return self._engine.tokenize(text, special=False)

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
            if kind == _USER_DEFINED and str(token) in self._source
        ]
        return re.compile("|".join(map(re.escape, names))) if names else None

    def _render(self, messages: list[dict[str, str]]) -> str:
        try:
            rendered = self._template.render(messages=messages, add_generation_prompt=True)
        except Exception as error:  # a template is a program of the file's author
            raise GGUFError(f"the chat template of {self._file} fails: {error}") from error
        return str(rendered)


def _compile(source: str, file: str) -> Any:
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    # The settings of transformers, for which templates are written.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _raise
    try:
        return environment.from_string(source)
    except (TemplateError, RecursionError) as error:
        raise GGUFError(f"the chat template of {file} does not parse: {error}") from error


def _raise(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)
