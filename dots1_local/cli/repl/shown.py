"""Text from anyone's file, made fit to be shown in a notice."""

from dots1_local.cli._plain import ControlFilter

__all__ = ["one_line", "plain"]

_SHOWN_CHARACTERS = 60


def plain(text: str) -> str:
    """Without terminal control."""
    harmless = ControlFilter()
    return harmless.feed(text) + harmless.finish()


def one_line(text: str) -> str:
    """Its beginning, on one line and without terminal control."""
    line = " ".join(plain(text).split())
    return line if len(line) <= _SHOWN_CHARACTERS else f"{line[:_SHOWN_CHARACTERS]}…"
