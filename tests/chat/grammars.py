"""Grammars judged by llama.cpp, and read independently of what wrote them."""

import ctypes
import random
import re
from itertools import pairwise
from typing import Any

from llama_cpp import llama_cpp as llama

from dots1_local.chat.grammar import Grammar
from dots1_local.engine.engine import Engine
from tests.helpers import EOS

Set = tuple[tuple[int, int], ...]
Symbols = tuple[str | Set, ...]

_ELEMENT = re.compile(r'\[((?:\\.|[^\]])*)\]|([a-z]\w*)|""')
_RANGE = re.compile(r"(\\x..|\\U.{8}|.)(?:-(\\x..|\\U.{8}|.))?")


def thing(required: list[str] | None = None, /, **properties: Any) -> dict[str, Any]:
    """The schema of an object."""
    return {"type": "object", "properties": properties, "required": required or []}


def accepts(engine: Engine, grammar: Grammar, text: str) -> bool:
    """Whether llama.cpp takes all the bytes one after another, and then the end."""
    sampler = llama.llama_sampler_init_grammar(engine.vocab, grammar.gbnf.encode(), b"root")
    assert sampler
    try:
        for token in text.encode():
            if not _allowed(sampler, token):
                return False
            llama.llama_sampler_accept(sampler, token)
        return _allowed(sampler, EOS)
    finally:
        llama.llama_sampler_free(sampler)


def _allowed(sampler: Any, token: int) -> bool:
    entry = (llama.llama_token_data * 1)((token, 1.0, 0.0))
    llama.llama_sampler_apply(
        sampler, ctypes.byref(llama.llama_token_data_array(entry, 1, -1, False))
    )
    return bool(entry[0].logit == 1.0)


def parsed(grammar: Grammar) -> dict[str, list[Symbols]]:
    """The rules of a grammar as text: each alternative's names and sets of characters."""
    rules = {}
    for line in grammar.gbnf.splitlines():
        name, _, body = line.partition(" ::= ")
        rules[name] = [_symbols(part) for part in re.split(r" \| ", body)]
    return rules


def _symbols(text: str) -> Symbols:
    assert re.fullmatch(rf"(?:(?:{_ELEMENT.pattern}) ?)+", text), text
    return tuple(
        name or tuple((_point(low), _point(high or low)) for low, high in _RANGE.findall(ranges))
        for ranges, name in _ELEMENT.findall(text)
        if name or ranges
    )


def _point(text: str) -> int:
    return int(text[2:], 16) if len(text) > 1 else ord(text)


def derived(rules: dict[str, list[Symbols]], rng: random.Random, patience: int = 400) -> str:
    """A random text of the grammar, which after so many symbols takes the shortest ways out."""
    shortest = _shortest(rules)
    written: list[str] = []
    stack: list[str | Set] = ["root"]
    while stack:
        symbol = stack.pop()
        patience -= 1
        if isinstance(symbol, str):
            ways = rules[symbol]
            way = rng.choice(ways) if patience > 0 else min(ways, key=lambda w: _cost(w, shortest))
            stack.extend(reversed(way))
        else:
            low, high = rng.choice(symbol)
            # Where there are many, those near the ends tell most.
            written.append(chr(rng.choice((low, high, rng.randint(low, high)))))
    return "".join(written)


def _shortest(rules: dict[str, list[Symbols]]) -> dict[str, float]:
    found = dict.fromkeys(rules, float("inf"))
    changed = True
    while changed:
        changed = False
        for name, ways in rules.items():
            best = min(_cost(way, found) for way in ways)
            if best < found[name]:
                found[name], changed = best, True
    return found


def _cost(way: Symbols, known: dict[str, float]) -> float:
    return sum(known[each] if isinstance(each, str) else 1 for each in way)


def ambiguous(rules: dict[str, list[Symbols]]) -> list[str]:
    """Rules of which a character leaves two ways to go on, by their first and following sets.

    Where there are none, llama.cpp follows one way only after each character.
    """
    empty = _emptiable(rules)
    first = _firsts(rules, empty)
    follow: dict[str, list[Set]] = {name: [] for name in rules}
    edges: dict[str, set[str]] = {name: set() for name in rules}
    for name, ways in rules.items():
        for way in ways:
            for at, symbol in enumerate(way):
                if not isinstance(symbol, str):
                    continue
                sets, open_end = _starts(way[at + 1 :], first, empty)
                follow[symbol].extend(sets)
                if open_end:
                    edges[symbol].add(name)
    found = []
    for name, ways in rules.items():
        starts = [_starts(way, first, empty) for way in ways]
        sets = [each for some, _ in starts for each in some]
        open_ends = sum(is_open for _, is_open in starts)
        after = [each for above in _reached(edges, name) for each in follow[above]]
        if open_ends > 1 or _overlapping(sets) or (open_ends and _meeting(sets, after)):
            found.append(name)
    return found


def _emptiable(rules: dict[str, list[Symbols]]) -> set[str]:
    empty: set[str] = set()
    while True:
        more = {
            name
            for name, ways in rules.items()
            if any(all(symbol in empty for symbol in way) for way in ways)
        }
        if more == empty:
            return empty
        empty = more


def _firsts(rules: dict[str, list[Symbols]], empty: set[str]) -> dict[str, list[Set]]:
    first: dict[str, list[Set]] = {}

    def visit(name: str) -> list[Set]:
        if name not in first:
            first[name] = []
            sets: list[Set] = []
            for way in rules[name]:
                for symbol in way:
                    sets += visit(symbol) if isinstance(symbol, str) else [symbol]
                    if symbol not in empty:
                        break
            first[name] = sets
        return first[name]

    for name in rules:
        visit(name)
    return first


def _starts(way: Symbols, first: dict[str, list[Set]], empty: set[str]) -> tuple[list[Set], bool]:
    sets: list[Set] = []
    for symbol in way:
        sets += first[symbol] if isinstance(symbol, str) else [symbol]
        if symbol not in empty:
            return sets, False
    return sets, True


def _reached(edges: dict[str, set[str]], name: str) -> set[str]:
    seen, left = {name}, [name]
    while left:
        for each in edges[left.pop()] - seen:
            seen.add(each)
            left.append(each)
    return seen


def _overlapping(sets: list[Set]) -> bool:
    ranges = sorted(each for some in sets for each in some)
    return any(low <= before for (_, before), (low, _) in pairwise(ranges))


def _meeting(some: list[Set], others: list[Set]) -> bool:
    return any(
        low <= end and start <= high
        for one in some
        for low, high in one
        for other in others
        for start, end in other
    )
