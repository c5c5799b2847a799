"""Names of files as text: a name may be any bytes, and Python keeps those that are not UTF-8 as
half surrogate pairs, which neither GGUF nor strict JSON can hold."""

import os

__all__ = ["unicode_name"]


def unicode_name(name: str | os.PathLike[str]) -> str:
    """The name or path, with U+FFFD for bytes that are not UTF-8."""
    return os.fsencode(name).decode(errors="replace")
