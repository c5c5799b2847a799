"""Sets of characters, as sorted ranges of code points."""

from collections.abc import Iterable

__all__ = ["EVERY", "Characters", "characters", "charset", "escaped", "without"]

Characters = tuple[tuple[int, int], ...]

EVERY: Characters = ((0, 0xD7FF), (0xE000, 0x10FFFF))  # all but surrogates


def charset(text: str) -> Characters:
    """The characters of a text."""
    return characters((ord(each), ord(each)) for each in text)


def characters(ranges: Iterable[tuple[int, int]]) -> Characters:
    """The union of ranges, both ends included, in any order."""
    merged: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = merged[-1][0], max(high, merged[-1][1])
        else:
            merged.append((low, high))
    return tuple(merged)


def without(some: Characters, others: Characters) -> Characters:
    """The characters of `some` that are not among `others`."""
    left: list[tuple[int, int]] = []
    for low, high in some:
        free = low
        for start, end in others:
            if start <= high and end >= free:
                if start > free:
                    left.append((free, start - 1))
                free = end + 1
        if free <= high:
            left.append((free, high))
    return tuple(left)


def escaped(some: Characters) -> str:
    """The set in GBNF: [a-z]."""
    ends = (_point(low) if low == high else f"{_point(low)}-{_point(high)}" for low, high in some)
    return f"[{''.join(ends)}]"


def _point(point: int) -> str:
    if chr(point).isascii() and chr(point).isalnum():
        return chr(point)
    return f"\\x{point:02X}" if point < 256 else f"\\U{point:08X}"
