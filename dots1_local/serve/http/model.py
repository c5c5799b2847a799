"""A loaded model: it reads the bodies of requests, and answers those that generate nothing."""

from typing import Any

from dots1_local.chat.prompt import Prompter, RawPrompter
from dots1_local.engine.engine import Engine
from dots1_local.errors import GGUFError, UsageError
from dots1_local.serve.generation import GenerationRequest
from dots1_local.serve.http import messages, responses
from dots1_local.serve.http.chat_request import read_chat
from dots1_local.serve.http.chat_writer import ChatWriter
from dots1_local.serve.http.completions import CompletionWriter, read_completion
from dots1_local.serve.http.props import model_meta, props
from dots1_local.serve.http.request import invalid, missing, read_fields
from dots1_local.serve.http.response import Writer
from dots1_local.serve.http.responses_writer import ResponsesWriter
from dots1_local.serve.http.shared_fields import Options
from dots1_local.serve.http.tokens import (
    DetokenizeFields,
    TokenizeFields,
    piece_of,
    text_of,
    tokenizer_info,
)

__all__ = ["Model"]


class Model:
    """A loaded model under its served name; several threads may use it at once."""

    def __init__(self, engine: Engine, name: str) -> None:
        self._engine, self.name = engine, name
        self.n_ctx, self.meta = engine.n_ctx, model_meta(engine)
        self._raw_prompter, self._no_chat = RawPrompter(engine), ""
        self._prompter: Prompter | None = None
        try:
            self._prompter = Prompter(engine, name)
        except GGUFError as error:  # a base model, which can still complete texts
            self._no_chat = str(error)

    def chat(self, raw: dict[str, Any]) -> tuple[list[GenerationRequest], Writer]:
        """Read a body of /v1/chat/completions, or raise an ApiError."""
        requests, tools, options = self._requests(raw, "messages")
        return requests, ChatWriter(self.name, options, len(requests), tools=tools)

    def _requests(
        self, raw: dict[str, Any], param: str
    ) -> tuple[list[GenerationRequest], bool, Options]:
        """Return the choices of a conversation, whether it has tools, and the options.

        `param` is the client's name of the field that is too long for the context.
        """
        tokens, tools, options = self._conversation(raw)
        tokens = options.truncated(tokens, self.n_ctx)
        return list(options.requests(self._checked(tokens, param))), tools, options

    def _conversation(self, raw: dict[str, Any]) -> tuple[list[int], bool, Options]:
        """Return a conversation's tokens, whether it has tools, and the options."""
        if self._prompter is None:
            raise invalid(f"{self._no_chat}; use /v1/completions", "messages")
        asked = read_chat(raw, self._engine)
        try:
            variables = self._prompter.checked_variables(asked.variables)
        except UsageError as error:
            raise invalid(str(error), "chat_template_kwargs") from None
        try:
            tokens = self._prompter.tokens(
                asked.messages, asked.tools, begun=asked.begun, variables=variables
            )
        except UsageError as error:  # the template cannot take these tools or tool calls
            raise invalid(str(error), "tools" if asked.tools else "messages") from None
        except GGUFError as error:  # the template refuses these messages
            raise invalid(str(error), "messages") from None
        return tokens, bool(asked.tools), asked.options

    def completion(self, raw: dict[str, Any]) -> tuple[list[GenerationRequest], Writer]:
        """Read a body of /v1/completions, or raise an ApiError."""
        asked = read_completion(raw, self._engine)
        options, room = asked.options, asked.options.choice.max_tokens != 0
        requests: list[GenerationRequest] = []
        echoes: list[str | None] = []
        for prompt in asked.prompts:
            # Clients of this endpoint render templates themselves, so markers become tokens.
            if isinstance(prompt, str):
                whole = self._raw_prompter.marked(prompt, bos=asked.bos)
            else:
                whole = prompt
            tokens = options.truncated(whole, self.n_ctx)
            requests += options.requests(self._checked(tokens, "prompt", room=room))
            echoed = prompt if len(tokens) == len(whole) else tokens
            echoes += [self._text(echoed) if asked.echo else None] * options.n
        return requests, CompletionWriter(self.name, options, echoes, asked.prompt_logprobs)

    def messages(self, raw: dict[str, Any]) -> tuple[list[GenerationRequest], Writer]:
        """Read a body of /v1/messages, or raise an ApiError."""
        requests, tools, options = self._requests(messages.as_chat(raw), "messages")
        n_prompt = len(requests[0].prompt)
        return requests, messages.MessagesWriter(self.name, options, n_prompt, tools=tools)

    def responses(self, raw: dict[str, Any]) -> tuple[list[GenerationRequest], Writer]:
        """Read a body of /v1/responses, or raise an ApiError."""
        requests, tools, options = self._requests(responses.as_chat(raw), "input")
        return requests, ResponsesWriter(self.name, options, raw, tools=tools)

    def count_tokens(self, raw: dict[str, Any]) -> dict[str, Any]:
        """Answer a body of /v1/messages/count_tokens, or raise an ApiError."""
        tokens, _, _ = self._conversation(messages.as_chat(raw, counting=True))
        return {"input_tokens": len(tokens)}

    def tokenize(self, raw: dict[str, Any]) -> dict[str, Any]:
        """Answer a body of /tokenize, or raise an ApiError."""
        fields = read_fields(raw, TokenizeFields)
        if fields.content is not None:
            return self._tokenize_content(fields)
        if fields.messages is not None:
            tokens, _, _ = self._conversation(raw)
        elif fields.prompt is not None:
            bos = fields.add_special_tokens is not False
            tokens = self._raw_prompter.marked(fields.prompt, bos=bos)
        else:
            raise missing("prompt")
        names = [text_of([token], self._engine) for token in tokens]
        return {
            "count": len(tokens),
            "max_model_len": self.n_ctx,
            "tokens": tokens,
            "token_strs": names if fields.return_token_strs else None,
        }

    def _tokenize_content(self, fields: TokenizeFields) -> dict[str, Any]:
        """Answer in llama-server's form."""
        if fields.prompt is not None or fields.messages is not None:
            raise invalid("content is llama-server's name of prompt; give one of them", "content")
        text, bos = fields.content or "", bool(fields.add_special)
        if fields.parse_special is not False:
            tokens = self._raw_prompter.marked(text, bos=bos)
        else:
            tokens = self._engine.tokenize(text, special=False, add_bos=bos)
        if not fields.with_pieces:
            return {"tokens": tokens}
        return {"tokens": [{"id": each, "piece": piece_of(each, self._engine)} for each in tokens]}

    def detokenize(self, raw: dict[str, Any]) -> dict[str, Any]:
        """Answer a body of /detokenize, or raise an ApiError; vLLM and llama-server agree on it.

        vLLM's answer is the `prompt`, and llama-server's is the `content`.
        """
        text = text_of(read_fields(raw, DetokenizeFields).tokens, self._engine)
        return {"prompt": text, "content": text}

    def tokenizer_info(self) -> dict[str, Any]:
        """Answer /tokenizer_info."""
        return tokenizer_info(self._engine)

    def props(self) -> dict[str, Any]:
        """Answer /props."""
        return props(self._engine, self.name)

    def _text(self, prompt: str | list[int]) -> str:
        return prompt if isinstance(prompt, str) else text_of(prompt, self._engine)

    def _checked(self, tokens: list[int], param: str, *, room: bool = True) -> tuple[int, ...]:
        """Check that the context has room for the prompt, and with `room` for one more token."""
        if len(tokens) <= self.n_ctx - room:
            return tuple(tokens)
        message = (  # OpenAI's words: clients look for them to shorten what they send
            f"This model's maximum context length is {self.n_ctx} tokens, and the prompt is "
            f"{len(tokens)} tokens long; shorten it, or serve with a larger --context"
        )
        raise invalid(message, param, "context_length_exceeded")
