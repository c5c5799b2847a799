"""What can go wrong, in kinds a caller can tell apart.

Every message is one sentence that says what is wrong, where, and what to do about it.
"""

__all__ = ["CheckpointError", "Dots1Error", "GGUFError", "UsageError"]


class Dots1Error(Exception):
    """Base of everything this package raises on bad input; `exit_code` is the CLI's."""

    exit_code = 1


class UsageError(Dots1Error):
    """The request itself makes no sense (unknown type, contradictory options)."""

    exit_code = 2


class CheckpointError(Dots1Error):
    """A Hugging Face checkpoint is missing something, corrupt, or of another architecture."""


class GGUFError(Dots1Error):
    """A GGUF file is missing, corrupt, or not what the command needs."""
