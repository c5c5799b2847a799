"""JSON numbers as rules, with or without bounds.

A number has at most 18 digits before the point, 24 after it and 2 in its exponent, which is enough
for ordinary doubles. With bounds it has no exponent and at most `EXACT` digits, so that rounding it
to a double never puts it out of bounds.
"""

from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from typing import Literal

from dots1_local.chat.json_schema.characters import Characters, charset
from dots1_local.chat.json_schema.rules import Rules, Symbols, text

__all__ = ["EXACT", "Bound", "integer", "number"]

EXACT = 15
_DIGITS, _PLACES = 18, 24
_DIGIT, _NOT_ZERO = charset("0123456789"), charset("123456789")
_MINUS, _POINT = charset("-"), charset(".")


@dataclass(frozen=True)
class Bound:
    """A minimum or maximum; `inclusive` if the number may equal it."""

    value: Decimal
    inclusive: bool = True


def integer(rules: Rules, low: Bound | None, high: Bound | None) -> list[Symbols]:
    """A whole number, without point and exponent."""
    if low is None and high is None:
        return _signed(rules, [text("0"), (_NOT_ZERO, _up_to(rules, _DIGITS - 1, ()))])
    least = _whole(low, ROUND_CEILING, 1) if low else None
    most = _whole(high, ROUND_FLOOR, -1) if high else None
    digits = (len(str(abs(each.value))) for each in (least, most) if each)
    return _between(rules, least, most, max(_DIGITS, *digits), 0)


def number(rules: Rules, low: Bound | None, high: Bound | None) -> list[Symbols]:
    """Any number; bounds may have at most `EXACT` digits before the point."""
    if low is None and high is None:
        few = rules.add((_DIGIT,), ())
        sign = rules.add((charset("+-"),), ())
        exponent = rules.add((charset("eE"), sign, _DIGIT, few), ())
        after = rules.add((_POINT, _DIGIT, _up_to(rules, _PLACES - 1, (exponent,))), (exponent,))
        before = _up_to(rules, _DIGITS - 1, (after,))
        return _signed(rules, [(charset("0"), after), (_NOT_ZERO, before)])
    digits = max(len(str(abs(int(each.value)))) for each in (low, high) if each)
    return _between(rules, low, high, EXACT, EXACT - digits)


def _signed(rules: Rules, magnitude: list[Symbols]) -> list[Symbols]:
    rule = rules.add(*magnitude)
    return [(_MINUS, rule), (rule,)]


def _up_to(rules: Rules, count: int, then: Symbols) -> int:
    rule = rules.add(then)
    for _ in range(count):
        rule = rules.add((_DIGIT, rule), then)
    return rule


def _whole(bound: Bound, rounding: str, step: Literal[1, -1]) -> Bound:
    """The whole number nearest to the bound that satisfies it."""
    value = bound.value.to_integral_value(rounding)
    return Bound(value + step if value == bound.value and not bound.inclusive else value)


def _between(
    rules: Rules, low: Bound | None, high: Bound | None, digits: int, places: int
) -> list[Symbols]:
    found: list[Symbols] = []
    if high is None or high.value >= 0:
        above = low if low and low.value >= 0 else None
        found.append((_Magnitudes(rules, above, high, places).rule(digits),))
    if low is None or low.value < 0:
        above = Bound(-high.value, high.inclusive) if high and high.value < 0 else None
        below = Bound(-low.value, low.inclusive) if low else None
        magnitudes = _Magnitudes(rules, above or Bound(Decimal(0), False), below, places)
        found.append((_MINUS, magnitudes.rule(digits)))
    return found


class _Magnitudes:
    """Numbers from 0 up, compared with bounds digit by digit.

    A rule depends on whether all digits so far are those of the lower bound (`at_low`), or of the
    upper (`at_high`): only then does the bound restrict the next one. Rules that cannot end are
    pruned later.
    """

    def __init__(self, rules: Rules, low: Bound | None, high: Bound | None, places: int) -> None:
        self._rules, self._low, self._high, self._places = rules, low, high, places
        self._low_digits, self._high_digits = _digits(low), _digits(high)
        self._known: dict[tuple[object, ...], int] = {}

    def rule(self, digits: int) -> int:
        """The numbers with at most so many digits before the point."""
        low, high = len(self._low_digits[0]), len(self._high_digits[0])
        lengths = range(max(low, 1), (min(digits, high) if self._high else digits) + 1)
        return self._rules.add(
            *(
                (self._before(left, bool(self._low) and left == low, left == high, True),)
                for left in lengths
            )
        )

    def _before(self, left: int, at_low: bool, at_high: bool, first: bool = False) -> int:
        """`left` more digits before the point; the first of several is not 0."""
        if not left:
            return self._end_or(0, at_low, at_high, _POINT)
        key = ("before", left, at_low, at_high, first)
        if key not in self._known:
            low = int(self._low_digits[0][-left]) if at_low else 0
            high = int(self._high_digits[0][-left]) if at_high else 9
            least = max(low, 1) if first and left > 1 else low
            self._known[key] = self._rules.add(
                *(
                    (digit, self._before(left - 1, at_low and is_low, at_high and is_high))
                    for digit, is_low, is_high in _grouped(least, low, high)
                )
            )
        return self._known[key]

    def _after(self, place: int, at_low: bool, at_high: bool) -> int:
        """One digit at this place after the point, and maybe more."""
        key = ("after", place, at_low, at_high)
        if key not in self._known:
            low = int(self._low_digits[1][place : place + 1] or 0) if at_low else 0
            high = int(self._high_digits[1][place : place + 1] or 0) if at_high else 9
            self._known[key] = self._rules.add(
                *(
                    (digit, self._end_or(place + 1, at_low and is_low, at_high and is_high))
                    for digit, is_low, is_high in _grouped(low, low, high)
                )
            )
        return self._known[key]

    def _end_or(
        self, place: int, at_low: bool, at_high: bool, point: Characters | None = None
    ) -> int:
        """The end, if what is written is in bounds, or further digits after the point."""
        too_small = (
            at_low and self._low and (self._low_digits[1][place:] or not self._low.inclusive)
        )
        too_large = (
            at_high and self._high and not (self._high_digits[1][place:] or self._high.inclusive)
        )
        key = ("end", place, at_low, at_high)
        if key not in self._known:
            ends: list[Symbols] = [] if too_small or too_large else [()]
            if place < self._places:
                more = self._after(place, at_low, at_high)
                ends.append((point, more) if point else (more,))
            self._known[key] = self._rules.add(*ends)
        return self._known[key]


def _digits(bound: Bound | None) -> tuple[str, str]:
    """The digits before and after the point, the latter without trailing zeros."""
    if bound is None:
        return "", ""
    before, _, after = format(bound.value, "f").partition(".")
    return before, after.rstrip("0")


def _grouped(least: int, low: int, high: int) -> list[tuple[Characters, bool, bool]]:
    """The digits from `least` to `high`, grouped by whether they equal `low` and `high`."""
    groups: dict[tuple[bool, bool], str] = {}
    for digit in range(least, high + 1):
        key = digit == low, digit == high
        groups[key] = groups.get(key, "") + str(digit)
    return [(charset(digits), *key) for key, digits in groups.items()]
