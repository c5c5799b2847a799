"""`dots1 chat` (being written)."""


def chat() -> None:
    """Not yet."""
