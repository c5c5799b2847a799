"""A model's chat template, rendered in Jinja's sandbox, because a stranger wrote it.

A template may compute for five seconds, once, and write 16 million characters, which is also as
far as it may pad a text. The time is checked in every iteration of a loop and every call of a
macro. A single step of Python is not interrupted, so a template can still take hundreds of
megabytes for a moment, by joining or replacing texts.
"""

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from functools import wraps
from typing import Any, NoReturn

from jinja2 import TemplateError, meta, nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dots1_local.errors import GGUFError, readable

__all__ = ["ChatTemplate"]

_SECONDS = 5.0  # a thousand turns take a hundredth of this
_MAX_LENGTH = 1 << 24  # characters
_MAX_INTEGER = 1 << 64
_MAX_POWER = 64
_LONG_NUMBER = re.compile(r"\d{8}")  # a width or precision beyond the limit
_GIVEN_WIDTH = re.compile(r"\*|\{[^{}]*\{")  # %*d, or {:{width}}
_PADS = "it pads a text to something too large"
_deadline: ContextVar[float] = ContextVar("deadline")
_slow: set[str] = set()  # templates that took too long


class ChatTemplate:
    """The template in `source`; errors call it by the name `file`.

    `variables` are the names that the template reads and does not set itself, such as "tools".

    Raises:
        GGUFError: the template does not parse.
    """

    def __init__(self, source: str, file: str) -> None:
        self.source, self._file = source, file
        try:
            environment = _Sandbox()
            tree = environment.parse(source)
            self.variables = frozenset(meta.find_undeclared_variables(tree))
            self._template = environment.from_string(_timed(tree))
        except Exception as error:
            problem = readable(str(error)) or type(error).__name__
            raise GGUFError(f"the chat template of {file} does not parse: {problem}") from error

    def render(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """Return the prompt that asks for the next assistant message.

        Raises:
            GGUFError: the template fails on these messages, or it exceeds its time or length.
        """
        _deadline.set(time.thread_time() + _SECONDS)
        try:
            if self.source in _slow:
                raise _TooSlowError
            return "".join(self._pieces({**variables, "messages": messages}))
        except (Exception, _TooSlowError) as error:  # a template can raise any exception
            if isinstance(error, _TooSlowError):
                _slow.add(self.source)
            problem = readable(str(error)) or type(error).__name__
            raise GGUFError(f"the chat template of {self._file} fails: {problem}") from error

    def _pieces(self, variables: Mapping[str, object]) -> Iterator[str]:
        length = 0
        for piece in self._template.generate(variables, add_generation_prompt=True):
            length += len(piece)
            if length > _MAX_LENGTH:
                raise TemplateError(f"it writes more than {_MAX_LENGTH} characters")
            yield piece


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with transformers' settings, without what keeps Python busy in one step."""

    intercepted_binops = frozenset(("*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        self.globals["raise_exception"] = _raise
        self.filters["tojson"] = _json
        for name in ("slice", "batch"):  # they count up to any number
            del self.filters[name]
        for name in ("center", "indent", "truncate", "wordwrap"):
            self.filters[name] = _checked(self.filters[name], _check_sizes)
        self.filters["format"] = _checked(self.filters["format"], _check_format)
        del self.globals["lipsum"]

    def call(self, context: Context, function: Any, /, *given: Any, **named: Any) -> Any:
        """Call a function; a text's own only with sizes within the limit."""
        format_method = getattr(function, "__wrapped__", None)  # str.format, behind Jinja's own
        if isinstance(text := getattr(format_method, "__self__", None), str):
            _check_format(text, *given, *named.values())
        elif isinstance(getattr(function, "__self__", None), str):
            _check_sizes(*given, *named.values())
        return super().call(context, function, *given, **named)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            _check_format(left, *(right if isinstance(right, tuple) else (right,)))
            return super().call_binop(context, operator, left, right)
        integers = [each for each in (left, right) if isinstance(each, int)]
        lengths = [len(each) for each in (left, right) if hasattr(each, "__len__")]
        if (
            any(abs(each) > _MAX_INTEGER for each in integers)
            or any(length * each > _MAX_LENGTH for length in lengths for each in integers)
            or (operator == "**" and abs(right) > _MAX_POWER)
        ):
            raise TemplateError(f"it computes {operator} of something too large")
        return super().call_binop(context, operator, left, right)

    def check_time(self) -> None:
        """End the template if its time is up; `_timed` puts calls of this into templates."""
        if time.thread_time() > _deadline.get():
            raise _TooSlowError


def _checked(made: Callable[..., Any], check: Callable[..., None]) -> Callable[..., Any]:
    """A filter whose arguments are checked."""

    @wraps(made)
    def checked(*given: Any, **named: Any) -> Any:
        check(*given, *named.values())
        return made(*given, **named)

    return checked


def _check_format(text: str, *given: object) -> None:
    """Check that a text that formats others does not pad them beyond the limit."""
    if _LONG_NUMBER.search(text):
        raise TemplateError(_PADS)
    if _GIVEN_WIDTH.search(text):
        _check_sizes(*given)


def _check_sizes(*given: object) -> None:
    if any(isinstance(value, int) and abs(value) > _MAX_LENGTH for value in given):
        raise TemplateError(_PADS)


class _TooSlowError(BaseException):
    """Not an Exception, because Jinja's filters swallow some of those."""

    def __str__(self) -> str:
        return f"it computes for more than {_SECONDS:g} seconds"


def _timed(tree: nodes.Template) -> nodes.Template:
    """Let every iteration of a loop and every call of a macro begin with a check of the time."""
    bodies = [loop.body for loop in tree.find_all(nodes.For)]
    bodies += [macro.body for macro in tree.find_all(nodes.Macro)]
    for body in bodies:
        check = nodes.Call(nodes.EnvironmentAttribute("check_time"), [], [], None, None)
        body.insert(0, nodes.ExprStmt(check, lineno=1))
    return tree


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON as transformers does; Jinja's own filter escapes < and & as for a web page."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
