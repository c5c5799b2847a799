"""What an answer must be, a JSON document of some schema, as a grammar in llama.cpp's notation."""

import json
from dataclasses import dataclass
from typing import Any, Self

from dots1_local.chat.json_schema.deterministic import deterministic
from dots1_local.chat.json_schema.gbnf import gbnf
from dots1_local.chat.json_schema.schema import Compiler
from dots1_local.errors import UsageError

__all__ = ["Grammar"]

_LONGEST = 1 << 18


@dataclass(frozen=True)
class Grammar:
    """A grammar in GBNF; its rule `root` is a whole answer.

    Those made here cost llama.cpp a bounded time for each token. One written by hand may not.
    """

    gbnf: str

    @classmethod
    def of_json_schema(cls, schema: Any) -> Self:
        """The documents that a JSON schema allows, with properties in the order it names them.

        The largest schemas take about a second.

        Raises:
            UsageError: it is no schema, uses what is not supported, or is too large.
        """
        try:
            length = len(json.dumps(schema, allow_nan=False, ensure_ascii=False).encode())
        except (TypeError, ValueError, RecursionError):
            raise UsageError("the schema is not JSON, or nested too deeply") from None
        if length > _LONGEST:
            raise UsageError(f"the schema has {length:,} bytes; at most {_LONGEST:,} are supported")
        compiler = Compiler(schema)
        try:
            root = compiler.compile()
        except RecursionError:
            raise UsageError("the schema is nested too deeply, or allOf in it never ends") from None
        return cls(gbnf(deterministic(compiler.rules, root)))

    @classmethod
    def json_object(cls) -> Self:
        """Any JSON object."""
        return cls.of_json_schema({"type": "object"})
