"""Replace a part of a Markdown page that is written by a program.

The part stands between the lines `<!-- NAME -->` and `<!-- /NAME -->`.
"""

import re
from pathlib import Path

__all__ = ["replace_block"]


def replace_block(page: Path, name: str, text: str) -> None:
    """Put `text`, whole lines, between the marks of `name`.

    Raises:
        ValueError: the page has no such marks.
    """
    old = page.read_text(encoding="utf-8")
    block = re.compile(rf"(?<=<!-- {name} -->\n).*?(?=<!-- /{name} -->)", re.DOTALL)
    if not block.search(old):
        raise ValueError(f"{page.name} has no lines <!-- {name} --> and <!-- /{name} -->")
    page.write_text(block.sub(lambda _: text, old), encoding="utf-8")
