"""The request body of POST /v1/chat/completions."""

from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta, Struct

from dots1_local.chat.dialogue import SYSTEM_PROMPT
from dots1_local.chat.grammar import Grammar
from dots1_local.chat.message import Message, ToolCall
from dots1_local.chat.tools import CallGrammar, ToolChoice
from dots1_local.engine.engine import Engine
from dots1_local.errors import Dots1Error, UsageError
from dots1_local.serve.http.request import Name, TokenCount, Unsupported, invalid, missing
from dots1_local.serve.http.shared_fields import Options, SharedFields
from dots1_local.serve.http.unsupported import OF_CHAT

__all__ = ["ChatFields", "ChatRequest", "Messages", "extensions", "read_chat"]

_MAX_MESSAGES, _MAX_PARTS = 1 << 14, 1 << 10
_MAX_TOOLS = 128  # OpenAI's limit
_MAX_VARIABLES = 64


class _TextPart(Struct, frozen=True, tag_field="type", tag="text"):
    text: str


class _RefusalPart(Struct, frozen=True, tag_field="type", tag="refusal"):
    refusal: str


_Content = str | Annotated[list[_TextPart | _RefusalPart], Meta(max_length=_MAX_PARTS)]


class _CalledFunction(Struct, frozen=True):
    name: Name
    arguments: str  # a JSON object as text


class _Call(Struct, frozen=True):
    function: _CalledFunction
    type: Literal["function"] | None = None
    id: str | None = None


class _Message(Struct, frozen=True):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: _Content | None = None
    tool_calls: Annotated[list[_Call], Meta(max_length=_MAX_TOOLS)] | None = None
    tool_call_id: str | None = None
    function_call: None = None  # OpenAI's former name of tool_calls
    prefix: bool | None = None  # DeepSeek's and Mistral's: the answer continues this message


class _Function(Struct, frozen=True):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None


class _Tool(Struct, frozen=True):
    function: _Function
    type: Literal["function"] | None = None


class _NamedFunction(Struct, frozen=True):
    name: str


class _NamedTool(Struct, frozen=True):
    function: _NamedFunction
    type: Literal["function"] | None = None


class _AllowedTools(Struct, frozen=True):
    mode: Literal["auto", "required"]
    tools: Annotated[list[_NamedTool], Meta(min_length=1, max_length=_MAX_TOOLS)]


class _ToolChoice(Struct, frozen=True):
    """The function that the answer must call, or those that it may call."""

    type: Literal["function", "allowed_tools"] | None = None
    function: _NamedFunction | None = None
    allowed_tools: _AllowedTools | None = None


Messages = Annotated[list[_Message], Meta(min_length=1, max_length=_MAX_MESSAGES)]


class ChatFields(SharedFields, frozen=True, kw_only=True):
    """The body of a request."""

    messages: Messages
    max_completion_tokens: TokenCount | None = None  # the newer name of max_tokens
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: Annotated[list[_Tool], Meta(max_length=_MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | _ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    continue_final_message: bool | None = None  # vLLM's, and the next one
    add_generation_prompt: bool | None = None
    chat_template_kwargs: Annotated[dict[str, Any], Meta(max_length=_MAX_VARIABLES)] | None = None

    unsupported: ClassVar[Unsupported] = OF_CHAT


def extensions(
    raw: Mapping[str, Any], kind: type[Struct], chat: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a chat's body with those fields of another API's body that mean the same in a chat.

    `kind` has the fields of the other API, of which `chat` is made.
    """
    known = {*ChatFields.__struct_fields__, *ChatFields.unsupported} - {*kind.__struct_fields__}
    made = {name: value for name, value in chat.items() if value is not None}
    return {name: raw[name] for name in raw.keys() & known} | made


@dataclass(frozen=True)
class ChatRequest:
    """A conversation, the tools as the client wrote them, and how to answer.

    If it is `begun`, the last message is the beginning of the answer. `variables` are for the chat
    template.
    """

    messages: list[Message]
    tools: list[dict[str, Any]]
    options: Options
    begun: bool
    variables: Mapping[str, Any]


def read_chat(raw: Mapping[str, Any], engine: Engine) -> ChatRequest:
    """Read a body.

    Raise an ApiError if a field is invalid or unsupported, or if fields contradict each other.
    """
    fields = ChatFields.read(raw)
    messages = _messages(fields.messages)
    begun = _is_begun(fields, messages[-1])
    tools = [] if fields.tool_choice == "none" else raw.get("tools") or []
    choice = _tool_choice(fields, {tool.function.name for tool in fields.tools or ()})
    if fields.top_logprobs and not fields.logprobs:
        raise invalid("top_logprobs needs logprobs; set logprobs to true", "top_logprobs")
    top_logprobs = fields.top_logprobs or 0 if fields.logprobs else None
    name = "max_completion_tokens" if fields.max_completion_tokens else "max_tokens"
    max_tokens = fields.limit(name)
    if max_tokens == 0:
        raise invalid("n_predict is 0; an answer has at least one token", "n_predict")
    options = fields.options(engine, max_tokens, top_logprobs)
    grammar = options.choice.grammar
    if tools:
        grammar = _call_grammar(fields, tools, engine, choice)
    if isinstance(grammar, Grammar) and begun:
        try:
            grammar = grammar.after(engine.tokenize(messages[-1].text, special=False))
        except UsageError as error:
            raise invalid(str(error), "messages") from None
    options = replace(options, choice=replace(options.choice, grammar=grammar))
    return ChatRequest(messages, tools, options, begun, fields.chat_template_kwargs or {})


def _call_grammar(
    fields: ChatFields, tools: list[dict[str, Any]], engine: Engine, choice: ToolChoice
) -> Grammar:
    """Return the grammar of calls, or of a document in the form that is asked for."""
    fields.refuse_late_end("tools")
    form = fields.format
    if form and form.schema is None:
        message = f"{form.param} together with tools is not supported; leave one out"
        raise invalid(message, form.param)
    try:
        return CallGrammar(tools, engine, choice, form and form.schema)
    except Dots1Error as error:
        raise invalid(str(error), "tools") from None


def _is_begun(fields: ChatFields, last: Message) -> bool:
    """Whether the last message is to be continued, which is so by default if it is an answer."""
    for index, each in enumerate(fields.messages):
        if each.prefix and (each.role != "assistant" or each is not fields.messages[-1]):
            problem = "only the last message, if it is the assistant's, can be continued"
            raise invalid(problem, f"messages[{index}].prefix")
    asked = fields.messages[-1].prefix or fields.continue_final_message
    anew = fields.add_generation_prompt
    answers = last.role == "assistant" and not last.tool_calls
    begun = answers and asked is not False and not anew
    if not begun and (asked or anew is False):
        message = "only an assistant's message without calls can be continued"
        raise invalid(f"{message}; leave out add_generation_prompt", "continue_final_message")
    return begun


def _tool_choice(fields: ChatFields, names: Set[str]) -> ToolChoice:
    """Return what tool_choice means, or raise an ApiError if there is no such tool."""
    chosen, parallel = fields.tool_choice, fields.parallel_tool_calls is not False
    if chosen in (None, "auto", "none"):
        return ToolChoice(parallel=parallel)
    if not names:
        raise invalid("tool_choice needs tools", "tool_choice")
    if not isinstance(chosen, _ToolChoice):
        return ToolChoice(required=True, parallel=parallel)
    allowed = chosen.allowed_tools
    functions = [tool.function for tool in allowed.tools] if allowed else [chosen.function]
    chosen_names = frozenset(function.name for function in functions if function)
    if not chosen_names:
        raise missing(f"tool_choice.{chosen.type or 'function'}")
    for name in chosen_names - names:
        message = f"tool_choice names {name!r:.80}, which is not among the tools"
        raise invalid(message, "tool_choice")
    if allowed:
        return ToolChoice(allowed.mode == "required", chosen_names, parallel)
    return ToolChoice(required=True, names=chosen_names, parallel=False)


def _messages(given: list[_Message]) -> list[Message]:
    """Convert messages; an empty system message asks for a conversation without one."""
    messages = [_message(each, index) for index, each in enumerate(given)]
    if not any(message.role == "system" for message in messages):
        messages = [Message("system", SYSTEM_PROMPT), *messages]
    messages = [message for message in messages if message.role != "system" or message.text]
    if not messages:
        raise invalid("messages has nothing to answer", "messages")
    return messages


def _message(given: _Message, index: int) -> Message:
    calls = tuple(map(_call, given.tool_calls or ())) if given.role == "assistant" else ()
    if given.content is None and not calls:
        raise missing(f"messages[{index}].content")
    if given.role == "tool" and given.tool_call_id is None:
        raise missing(f"messages[{index}].tool_call_id")
    role = "system" if given.role == "developer" else given.role
    text, call_id = _text(given.content or ""), given.tool_call_id or ""
    return Message(role, text, tool_calls=calls, tool_call_id=call_id)


def _call(given: _Call) -> ToolCall:
    return ToolCall(given.function.name, given.function.arguments or "{}", given.id or "")


def _text(content: _Content) -> str:
    """Return the text of a message, with a line break between its parts."""
    if isinstance(content, str):
        return content
    return "\n".join(part.text if isinstance(part, _TextPart) else part.refusal for part in content)
