"""The loaded model as requests see it: their prompts become tokens, and orders for the engine."""

from dots1_local.chat.prompt import Prompter, RawPrompter
from dots1_local.engine.engine import Engine
from dots1_local.errors import GGUFError, UsageError
from dots1_local.serve.generation import Order
from dots1_local.serve.http.answering import Writer
from dots1_local.serve.http.body import Fields
from dots1_local.serve.http.chat_request import take_chat
from dots1_local.serve.http.chat_writer import ChatWriter
from dots1_local.serve.http.completions import CompletionWriter, take_completion
from dots1_local.serve.http.errors import ApiError, invalid

__all__ = ["Model"]


class Model:
    """A model under the name it is served by; several threads may use it at once."""

    def __init__(self, engine: Engine, name: str) -> None:
        self._engine, self.name = engine, name
        self.n_ctx = engine.n_ctx
        self._document, self._no_chat = RawPrompter(engine), ""
        self._prompter: Prompter | None = None
        try:
            self._prompter = Prompter(engine, name)
        except GGUFError as error:  # a base model; its texts can be completed
            self._no_chat = str(error)

    def chat(self, fields: Fields) -> tuple[list[Order], Writer]:
        """What a body of /v1/chat/completions asks for.

        Raises:
            ApiError: it is malformed, too long, or asks for something unsupported.
        """
        if self._prompter is None:
            raise invalid(f"{self._no_chat}; use /v1/completions", "messages")
        request = take_chat(fields, self._engine.n_vocab)
        if request.tools and not self._prompter.writes_tool_calls:
            message = "the model's chat template knows no tools, or not with calls in <tool_call>"
            raise invalid(f"{message}; leave out tools", "tools")
        try:
            tokens = self._prompter.tokens(request.messages, request.tools)
        except UsageError as error:  # tools, or calls of them, that the template cannot take
            raise invalid(str(error), "tools" if request.tools else "messages") from None
        except GGUFError as error:  # the template's refusal of these messages
            raise invalid(str(error), "messages") from None
        orders = list(request.options.orders(self._fitting(tokens, "messages")))
        tools = bool(request.tools)
        return orders, ChatWriter(self.name, request.options, len(orders), tools=tools)

    def completion(self, fields: Fields) -> tuple[list[Order], Writer]:
        """What a body of /v1/completions asks for.

        Raises:
            ApiError: it is malformed, too long, or asks for something unsupported.
        """
        request = take_completion(fields, self._engine.n_vocab)
        orders: list[Order] = []
        echoes: list[str] = []
        for prompt in request.prompts:
            # Clients that complete texts render templates themselves: markers in them are meant.
            tokens = self._document.marked(prompt) if isinstance(prompt, str) else list(prompt)
            orders += request.options.orders(self._fitting(tokens, "prompt"))
            echo = (prompt if isinstance(prompt, str) else self._text(prompt)) * request.echo
            echoes += [echo] * request.options.n
        return orders, CompletionWriter(self.name, request.options, echoes)

    def _text(self, tokens: tuple[int, ...]) -> str:
        return b"".join(map(self._engine.piece, tokens)).decode("utf-8", errors="replace")

    def _fitting(self, tokens: list[int], param: str) -> tuple[int, ...]:
        """The tokens, if they leave room for at least one more."""
        if len(tokens) >= self.n_ctx:
            raise too_long(len(tokens), self.n_ctx, param)
        return tuple(tokens)


def too_long(count: int, n_ctx: int, param: str) -> ApiError:
    """Worded as OpenAI does: clients look for it, to shorten what they send."""
    message = (
        f"This model's maximum context length is {n_ctx} tokens, and the prompt is {count} tokens "
        "long; shorten it, or serve with a larger --context"
    )
    return invalid(message, param, "context_length_exceeded")
