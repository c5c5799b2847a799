"""`dots1 perplexity` (being written)."""


def perplexity() -> None:
    """Not yet."""
