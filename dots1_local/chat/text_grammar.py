"""What an answer must be, if not JSON: a regular expression, one of several texts, or GBNF.

GBNF is llama.cpp's notation of grammars. `from_regex`, `from_choices` and `from_gbnf` return a
grammar in llguidance's notation, and raise a UsageError if they cannot.
"""

import json
from collections.abc import Sequence

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import gbnf_to_lark

from dots1_local.chat.grammar import Grammar
from dots1_local.engine.engine import Engine
from dots1_local.errors import UsageError

__all__ = ["TextGrammar", "from_choices", "from_gbnf", "from_regex"]

_MAX_LENGTH = 1 << 14  # characters; compiling one part many times takes seconds and a gigabyte
# llguidance compiles recursively, and overflows a stack of 8 MiB after some 4,000 rules in a row.
_MAX_RULES = 1000


class TextGrammar(Grammar):
    """A compiled grammar of texts, in llguidance's notation; what it raises `Grammar` raises."""

    noun = "grammar"

    def __init__(self, source: str, engine: Engine) -> None:
        self._compile(source, engine)


def from_regex(pattern: str) -> str:
    """Convert a regular expression, which the whole answer must match."""
    _check_length(pattern)
    return LLMatcher.grammar_from_regex(pattern)


def from_choices(choices: Sequence[str]) -> str:
    """Convert texts, of which the answer must be one."""
    _check_length("".join(choices))
    return "start: " + " | ".join(json.dumps(each, ensure_ascii=False) for each in choices)


def from_gbnf(grammar: str) -> str:
    """Convert a GBNF grammar, whose first rule is `root`."""
    _check_length(grammar)
    if grammar.count("::=") > _MAX_RULES:
        raise UsageError(f"the grammar has more than {_MAX_RULES:,} rules")
    try:
        return gbnf_to_lark(grammar)
    except RecursionError:
        raise UsageError("the grammar is nested too deeply") from None
    except Exception as error:  # what a strange grammar raises in it is not documented
        reason = " ".join(str(error).split())[:300]
        raise UsageError(f"the grammar is not GBNF: {reason}") from None


def _check_length(text: str) -> None:
    if len(text) > _MAX_LENGTH:
        message = f"the grammar has {len(text):,} characters; at most {_MAX_LENGTH:,} are supported"
        raise UsageError(message)
