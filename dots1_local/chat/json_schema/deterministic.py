"""A grammar rewritten so that each character leaves only one way to go on.

llama.cpp follows all ways at once, and where a grammar is ambiguous their number may double with
every character. So alternatives that begin alike are merged up to where they differ: the subset
construction of finite automata, on rules. A schema for which that has no end is refused.
"""

from collections.abc import Iterable
from itertools import pairwise

from dots1_local.chat.json_schema.characters import Characters, characters
from dots1_local.chat.json_schema.rules import Rules, Symbol, Symbols, too_large
from dots1_local.errors import UsageError

__all__ = ["deterministic"]

_MOST_RULES = 20_000
_MOST_STEPS = 2_000_000  # symbols looked at; about a second
_MOST_ALTERNATIVES = 200  # in one place; each costs a pass over the vocabulary
_SHORT = 2  # as many symbols are written out rather than made a rule

_Choice = frozenset[Symbols]


def deterministic(rules: Rules, root: int) -> list[list[Symbols]]:
    """The rewritten rules, the root first; all alternatives of a rule begin with a character.

    Raises:
        UsageError: there are too many, or the schema allows no document.
    """
    rules.prune()
    if not rules.alternatives[root]:
        raise UsageError("the schema allows no document at all that has an end")
    return _Factoring(rules.alternatives).run(frozenset(rules.alternatives[root]))


class _Factoring:
    """Makes a rule of each choice between sequences that comes up; `_known` has their numbers."""

    def __init__(self, alternatives: list[list[Symbols]]) -> None:
        self._alternatives = [frozenset(each) for each in alternatives]
        self._known: dict[_Choice, int] = {}
        self._waiting: list[_Choice] = []
        self._steps = 0

    def run(self, root: _Choice) -> list[list[Symbols]]:
        self._rule(root)
        made: list[list[Symbols]] = []
        while len(made) < len(self._waiting):
            made.append(self._written(self._waiting[len(made)]))
        return made

    def _rule(self, choice: _Choice) -> int:
        if choice not in self._known:
            if len(self._known) == _MOST_RULES:
                raise too_large()
            self._known[choice] = len(self._known)
            self._waiting.append(choice)
        return self._known[choice]

    def _written(self, choice: _Choice) -> list[Symbols]:
        if len(choice) == 1:
            return [self._named(next(iter(choice)))]
        shared = _shared(choice)
        if shared:
            rest = frozenset(sequence[len(shared) :] for sequence in choice)
            return [(*self._named(shared), *self._rest(rest))]
        return self._split(self._expanded(choice))

    def _split(self, sequences: set[Symbols]) -> list[Symbols]:
        """One alternative for each set of first characters that the same rests may follow."""
        nothing: list[Symbols] = [()] if () in sequences else []
        starts = [(each[0], each[1:]) for each in sequences if each]
        split = [(first, *self._rest(rests)) for rests, first in self._parted(starts).items()]
        if len(split) > _MOST_ALTERNATIVES:
            raise UsageError(
                f"the schema leaves {len(split)} ways to go on at one place; "
                f"{_MOST_ALTERNATIVES} are possible"
            )
        return [*split, *nothing]

    def _parted(self, starts: list[tuple[Symbol, Symbols]]) -> dict[_Choice, Characters]:
        """For each set of rests, the first characters that exactly those may follow."""
        opening: dict[int, list[Symbols]] = {}
        closing: dict[int, list[Symbols]] = {}
        for first, rest in starts:
            assert isinstance(first, tuple)
            for low, high in first:
                opening.setdefault(low, []).append(rest)
                closing.setdefault(high + 1, []).append(rest)
        found: dict[_Choice, list[tuple[int, int]]] = {}
        open_now: dict[Symbols, int] = {}
        for point, following in pairwise(sorted({*opening, *closing})):
            for rest in closing.get(point, ()):
                open_now[rest] -= 1
                if not open_now[rest]:
                    del open_now[rest]
            for rest in opening.get(point, ()):
                open_now[rest] = open_now.get(rest, 0) + 1
            if open_now:
                self._step(len(open_now))
                found.setdefault(frozenset(open_now), []).append((point, following - 1))
        return {rests: characters(ranges) for rests, ranges in found.items()}

    def _expanded(self, choice: Iterable[Symbols]) -> set[Symbols]:
        """The same sequences with rules at their beginning expanded until none begins with one."""
        seen, left = set(choice), list(choice)
        expanded = set()
        while left:
            sequence = left.pop()
            if not sequence or isinstance(sequence[0], tuple):
                expanded.add(sequence)
                continue
            for each in self._alternatives[sequence[0]]:
                longer = each + sequence[1:]
                self._step(len(longer) + 1)
                if longer not in seen:
                    seen.add(longer)
                    left.append(longer)
        return expanded

    def _rest(self, choice: _Choice) -> Symbols:
        only = next(iter(choice)) if len(choice) == 1 else None
        if only is not None and len(only) <= _SHORT:
            return self._named(only)
        return (self._rule(choice),)

    def _named(self, sequence: Symbols) -> Symbols:
        """The sequence with its rules under their new numbers."""
        return tuple(
            self._rule(self._alternatives[each]) if isinstance(each, int) else each
            for each in sequence
        )

    def _step(self, count: int) -> None:
        self._steps += count
        if self._steps > _MOST_STEPS:
            raise too_large()


def _shared(choice: _Choice) -> Symbols:
    """What all the sequences begin with."""
    first = min(choice, key=len)
    length = 0
    while length < len(first) and all(each[length] == first[length] for each in choice):
        length += 1
    return first[:length]
