"""Markdown in a terminal, rendered while it streams."""

from dots1_local.cli._markdown.stream import MarkdownStream

__all__ = ["MarkdownStream"]
