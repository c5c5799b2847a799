"""`dots1 inspect` (being written)."""


def inspect() -> None:
    """Not yet."""
