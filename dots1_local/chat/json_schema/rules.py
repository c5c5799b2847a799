"""A grammar under construction: rules that refer to each other, which may be ambiguous."""

from collections.abc import Iterable

from dots1_local.chat.json_schema.characters import Characters, charset
from dots1_local.errors import UsageError

__all__ = ["Rules", "Symbol", "Symbols", "text", "too_large"]

_MOST_SYMBOLS = 200_000  # some tenths of a second

Symbol = int | Characters  # a rule by its number, or any one character of a set
Symbols = tuple[Symbol, ...]


class Rules:
    """A rule is a list of alternatives, each a sequence of symbols."""

    def __init__(self) -> None:
        self.alternatives: list[list[Symbols]] = []
        self._symbols = 0

    def add(self, *alternatives: Symbols) -> int:
        """A new rule; its number.

        Raises:
            UsageError: the grammar becomes too large.
        """
        rule = self.reserve()
        self.extend(rule, alternatives)
        return rule

    def reserve(self) -> int:
        """A new rule without alternatives, which may then refer to itself."""
        self.alternatives.append([])
        self._count(1)
        return len(self.alternatives) - 1

    def extend(self, rule: int, alternatives: Iterable[Symbols]) -> None:
        """Give a rule more alternatives.

        Raises:
            UsageError: the grammar becomes too large.
        """
        for alternative in alternatives:
            self._count(len(alternative) + 1)
            self.alternatives[rule].append(alternative)

    def prune(self) -> None:
        """Drop alternatives that never come to an end; a rule may be left with none."""
        needs = [
            [(rule, {each for each in sequence if isinstance(each, int)}) for sequence in sequences]
            for rule, sequences in enumerate(self.alternatives)
        ]
        waiting: dict[int, list[tuple[int, set[int]]]] = {}
        ends: set[int] = set()
        found = []
        for rule, missing in (each for group in needs for each in group):
            for each in missing:
                waiting.setdefault(each, []).append((rule, missing))
            if not missing:
                found.append(rule)
        while found:
            rule = found.pop()
            if rule in ends:
                continue
            ends.add(rule)
            for user, missing in waiting.get(rule, ()):
                missing.discard(rule)
                if not missing:
                    found.append(user)
        for rule, sequences in enumerate(self.alternatives):
            self.alternatives[rule] = [
                sequence
                for sequence in sequences
                if all(each in ends for each in sequence if isinstance(each, int))
            ]

    def _count(self, symbols: int) -> None:
        self._symbols += symbols
        if self._symbols > _MOST_SYMBOLS:
            raise too_large()


def text(content: str) -> Symbols:
    """The characters of a fixed text."""
    return tuple(charset(each) for each in content)


def too_large() -> UsageError:
    return UsageError(
        "the schema makes too large a grammar; let lengths, repetitions and enums be smaller, or "
        "alternatives differ sooner, such as by the value of their first property"
    )
