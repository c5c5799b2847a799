"""Numbers of bytes and of tokens as people write and read them."""

import re

from dots1_local.errors import UsageError

__all__ = ["bytes_apart", "human_bytes", "parse_context", "parse_size"]

_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,15})?)\s*(?:([kmgt])(i?)b?|b)?", re.IGNORECASE | re.ASCII)
_CONTEXT = re.compile(r"(\d{1,9})(k?)", re.IGNORECASE | re.ASCII)


def parse_size(text: str, *, minimum: int = 1) -> int:
    """Bytes from '48G', '1.5 GB', '24GiB' or a plain number; units without an 'i' are decimal.

    Raises:
        UsageError: the text is not a size of at least `minimum` bytes.
    """
    match = _SIZE.fullmatch(text.strip())
    if match:
        number, prefix, binary = match.groups()
        power = " kmgt".index((prefix or " ").lower())
        size = int(float(number) * (1024 if binary else 1000) ** power)
        if size >= minimum:
            return size
    raise UsageError(f"{text!r} is not a size such as 48G, 500MB or 24GiB")


def human_bytes(count: float) -> str:
    """1536 -> '1.5 kB'; decimal units, as disks and downloads are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def bytes_apart(one: float, other: float) -> tuple[str, str]:
    """Two numbers of bytes as `human_bytes` writes them, or exactly if they would read alike."""
    shown = human_bytes(one), human_bytes(other)
    return shown if shown[0] != shown[1] else (f"{one:,.0f} bytes", f"{other:,.0f} bytes")


def parse_context(text: str) -> int:
    """Parse a number of tokens: '16k' is 16,384, '32768' is itself.

    Raises:
        UsageError: the text has another form, or the number is 0.
    """
    match = _CONTEXT.fullmatch(text.strip())
    if match and (tokens := int(match[1]) * (1024 if match[2] else 1)):
        return tokens
    raise UsageError(f"{text!r} is not a context size; write it as 16k or 32768")
