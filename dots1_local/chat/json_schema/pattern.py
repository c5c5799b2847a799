"""Regular expressions as rules for JSON strings.

JSON schemas use ECMAScript's expressions, and many validators are written in Python. Supported is
what means the same in both; of a class like \\w only the characters that both match are written.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dots1_local.chat.json_schema.characters import EVERY, Characters, characters, charset, without
from dots1_local.chat.json_schema.rules import Rules, Symbols
from dots1_local.chat.json_schema.strings import QUOTE, encoded
from dots1_local.errors import UsageError
from dots1_local.files.json_file import brief

__all__ = ["pattern"]

_LONGEST, _DEEPEST = 1000, 50
_LETTERS = ((65, 90), (97, 122))
_NOT_ASCII = without(EVERY, ((0, 127),))
_LINE_ENDS = charset("\n\r\u2028\u2029")
_SPACES = charset(" \t\n\r\f\v")
_CONTROLS = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v", "0": "\0"}
_REPETITION = re.compile(r"\*|\+|\?|\{(\d{1,5})(,(\d{1,5})?)?\}")
_HEX = re.compile(r"x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})")

_Part = Callable[[int], int]  # from the rule that follows to the rule for the part and that


@dataclass(frozen=True)
class _Class:
    """The characters that match in every dialect, and those that match in at least one."""

    surely: Characters
    maybe: Characters

    def negated(self) -> "_Class":
        return _Class(without(EVERY, self.maybe), without(EVERY, self.surely))


_DIGITS = _Class(charset("0123456789"), characters((*charset("0123456789"), *_NOT_ASCII)))
_WORD = characters((*_LETTERS, *charset("0123456789_")))
_CLASSES = {
    "d": _DIGITS,
    "w": _Class(_WORD, characters((*_WORD, *_NOT_ASCII))),
    "s": _Class(
        _SPACES,
        characters(
            [
                *_SPACES,
                *_LINE_ENDS,
                (0x1C, 0x1F),
                (0x2000, 0x200A),
                *charset("\x85\xa0\u1680\u202f\u205f\u3000\ufeff"),
            ]
        ),
    ),
}


def pattern(rules: Rules, source: str, place: str) -> Symbols:
    """A string in which the expression matches; anywhere, unless ^ and $ say where.

    Raises:
        UsageError: it is malformed, or not supported.
    """
    if len(source) > _LONGEST:
        raise UsageError(f"the pattern at {place} is longer than {_LONGEST:,} characters")
    return (QUOTE, _Parser(rules, source, place).whole())


class _Parser:
    def __init__(self, rules: Rules, source: str, place: str) -> None:
        self._rules, self._source, self._place = rules, source, place
        self._at = self._depth = 0

    def whole(self) -> int:
        """The rule for all that comes after the string's opening quote."""
        end = self._rules.add((QUOTE,))
        found = [self._anchored(end)]
        while self._take("|"):
            found.append(self._anchored(end))
        if self._at < len(self._source):
            raise self._refusal("a ) too many")
        return self._rules.add(*((each,) for each in found))

    def _anchored(self, end: int) -> int:
        from_start = self._take("^")
        part = self._sequence()
        rule = part(end if self._take("$") else self._anything(end))
        return rule if from_start else self._anything(rule)

    def _anything(self, then: int) -> int:
        return _repeated(self._rules, self._one(EVERY), 0, None)(then)

    def _either(self) -> _Part:
        parts = [self._sequence()]
        while self._take("|"):
            parts.append(self._sequence())
        return lambda then: self._rules.add(*((part(then),) for part in parts))

    def _sequence(self) -> _Part:
        parts = []
        while self._next() not in ("", "|", ")", "$"):
            parts.append(self._repetition(self._atom()))
        return lambda then: _chained(parts, then)

    def _repetition(self, part: _Part) -> _Part:
        match = _REPETITION.match(self._source, self._at)
        if not match:
            return part
        self._at = match.end()
        self._take("?")  # lazy or not, the same texts match
        if self._next() in ("*", "+", "?", "{"):
            raise self._refusal("a repetition of a repetition")
        if match[1] is None:
            least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}[match[0]]
        else:
            least = int(match[1])
            most = least if match[2] is None else int(match[3]) if match[3] else None
        if most is not None and most < least:
            raise self._refusal(f"{match[0]}, which nothing matches")
        return _repeated(self._rules, part, least, most)

    def _atom(self) -> _Part:
        character = self._read()
        if character == "(":
            return self._group()
        if character == "[":
            return self._one(self._class().surely)
        if character == ".":
            return self._one(without(EVERY, _LINE_ENDS))
        if character == "\\":
            return self._one(self._escape().surely)
        if character in "^*+?{":
            raise self._refusal(f"{character!r} in this place")
        return self._one(charset(character))

    def _group(self) -> _Part:
        if self._next() == "?" and not self._source.startswith("?:", self._at):
            raise self._refusal(f"{self._source[self._at - 1 : self._at + 3]!r}")
        if self._take("?"):
            self._take(":")
        self._depth += 1
        if self._depth > _DEEPEST:
            raise self._refusal(f"groups {self._depth} deep")
        part = self._either()
        self._depth -= 1
        if not self._take(")"):
            raise self._refusal("a group that is not closed" if not self._next() else "'$' in it")
        return part

    def _class(self) -> _Class:
        negated = self._take("^")
        if self._next() == "]":
            raise self._refusal("an empty class")
        surely: list[tuple[int, int]] = []
        maybe: list[tuple[int, int]] = []
        while not self._take("]"):
            found = self._member()
            if self._next() == "-" and self._source[self._at + 1 : self._at + 2] not in ("]", ""):
                self._at += 1
                found = self._range(found, self._member())
            surely.extend(found.surely)
            maybe.extend(found.maybe)
        found = _Class(characters(surely), characters(maybe))
        return found.negated() if negated else found

    def _range(self, first: _Class, last: _Class) -> _Class:
        ends = first.surely + last.surely
        if any(
            len(each.surely) != 1 or each.surely[0][0] != each.surely[0][1]
            for each in (first, last)
        ):
            raise self._refusal("a range between classes")
        if ends[0] > ends[1]:
            raise self._refusal("a range that ends before it begins")
        span = without(((ends[0][0], ends[1][0]),), ((0xD800, 0xDFFF),))
        return _Class(span, span)

    def _member(self) -> _Class:
        character = self._read()
        if character == "\\":
            return self._escape()
        return _Class(charset(character), charset(character))

    def _escape(self) -> _Class:
        match = _HEX.match(self._source, self._at)
        if match:
            self._at = match.end()
            point = int(match[1] or match[2], 16)
            return self._literal(chr(point))
        name = self._read()
        if name.lower() in _CLASSES:
            found = _CLASSES[name.lower()]
            return found if name.islower() else found.negated()
        if name in _CONTROLS and not (name == "0" and self._next().isdigit()):
            return self._literal(_CONTROLS[name])
        if name.isalnum() or not name.isascii():
            raise self._refusal(f"'\\{name}'")
        return self._literal(name)

    def _literal(self, character: str) -> _Class:
        if not without(charset(character), ((0xD800, 0xDFFF),)):
            raise self._refusal("half a surrogate pair")
        return _Class(charset(character), charset(character))

    def _one(self, some: Characters) -> _Part:
        ways = list(encoded(some))
        return lambda then: self._rules.add(*((*way, then) for way in ways))

    def _next(self) -> str:
        return self._source[self._at : self._at + 1]

    def _take(self, character: str) -> bool:
        taken = self._next() == character
        self._at += taken
        return taken

    def _read(self) -> str:
        character = self._next()
        if not character:
            raise self._refusal("an end where more must come")
        self._at += 1
        return character

    def _refusal(self, what: str) -> UsageError:
        return UsageError(
            f"the pattern {brief(self._source)} at {self._place} has {what}, which is not supported"
        )


def _chained(parts: Sequence[_Part], then: int) -> int:
    for part in reversed(parts):
        then = part(then)
    return then


def _repeated(rules: Rules, part: _Part, least: int, most: int | None) -> _Part:
    def rule(then: int) -> int:
        if most is None:
            loop = rules.reserve()
            rules.extend(loop, [(then,), (part(loop),)])
            then = loop
        else:
            after = then
            for _ in range(most - least):
                then = rules.add((after,), (part(then),))
        for _ in range(least):
            then = part(then)
        return then

    return rule
