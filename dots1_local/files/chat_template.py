"""A model's chat template, rendered in a sandbox: it is a program its author wrote.

It may run for five seconds and write 16 million characters. That ends its loops and recursions; it
does not end a single step of Python's own, such as padding a text to a billion characters.
"""

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from jinja2 import TemplateError, meta
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dots1_local.errors import GGUFError

__all__ = ["ChatTemplate"]

_SECONDS = 5.0  # a thousand turns take a hundredth of it
_LONGEST = 1 << 24
_LARGEST_INTEGER = 1 << 64
_LARGEST_POWER = 64


class ChatTemplate:
    """The template in `source`; `file` is what errors call it by.

    `variables` are the names it reads and does not set itself, such as "tools".

    Raises:
        GGUFError: it does not parse.
    """

    def __init__(self, source: str, file: str) -> None:
        self.source, self._file = source, file
        # The settings of transformers, for which templates are written.
        environment = _Sandbox(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _raise
        environment.filters["tojson"] = _json
        try:
            with _limited_time():  # Jinja computes what is constant while it compiles
                self._template = environment.from_string(source)
                self.variables = frozenset(
                    meta.find_undeclared_variables(environment.parse(source))
                )
        except (Exception, _TooLongError) as error:
            problem = _in_a_line(error)
            raise GGUFError(f"the chat template of {file} does not parse: {problem}") from error

    def render(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """The prompt that asks for the next assistant message.

        Raises:
            GGUFError: the template fails on these messages, or comes to no end.
        """
        try:
            with _limited_time():
                return "".join(self._pieces({**variables, "messages": messages}))
        except (Exception, _TooLongError) as error:  # whatever a stranger's program raises
            problem = _in_a_line(error)
            raise GGUFError(f"the chat template of {self._file} fails: {problem}") from error

    def _pieces(self, variables: Mapping[str, object]) -> Iterator[str]:
        length = 0
        for piece in self._template.generate(variables, add_generation_prompt=True):
            length += len(piece)
            if length > _LONGEST:
                raise TemplateError(f"it writes more than {_LONGEST} characters")
            yield piece


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's, without the two operators that can keep Python busy for hours in one step."""

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        integers = [each for each in (left, right) if isinstance(each, int)]
        lengths = [len(each) for each in (left, right) if hasattr(each, "__len__")]
        if (
            any(abs(each) > _LARGEST_INTEGER for each in integers)
            or any(length * each > _LONGEST for length in lengths for each in integers)
            or (operator == "**" and abs(right) > _LARGEST_POWER)
        ):
            raise TemplateError(f"it computes {operator} of something too large")
        return super().call_binop(context, operator, left, right)


class _TooLongError(BaseException):
    """Not an Exception, because Jinja's filters swallow some of those."""

    def __str__(self) -> str:
        return f"it runs for more than {_SECONDS:.0f} seconds"


@contextmanager
def _limited_time() -> Iterator[None]:
    """End the block's Python code when its time is up, wherever it is."""
    end = time.monotonic() + _SECONDS

    def check(frame: FrameType, event: str, argument: Any) -> Any:
        if time.monotonic() > end:
            raise _TooLongError
        return check

    before = sys.gettrace()
    sys.settrace(check)
    try:
        yield
    finally:
        sys.settrace(before)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers has it; Jinja's own filter of this name writes < and & as for a web page."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _in_a_line(error: BaseException) -> str:
    """What went wrong, in words that the file's author may have chosen."""
    line = " ".join(str(error).split())[:200] or type(error).__name__
    return "".join(character if character.isprintable() else "?" for character in line)
