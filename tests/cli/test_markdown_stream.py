"""Properties of rendered Markdown that hold for every text and every way to cut it."""

import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from rich.cells import cell_len

from dots1_local.cli.repl.markdown import MarkdownStream
from tests.cli.test_markdown import SGR, letters, render, visible

PROSE = st.lists(st.text("abcdefgéß,.?’", min_size=1, max_size=12), min_size=1)
CHINESE = st.text("动态量化模型，。、“”（）！的GPT", min_size=1)
# Pieces of Markdown in any order, mostly broken.
MARKUP = [
    *("*", "**", "***", "_", "~~", "`", "```", "~~~", "[", "](u)", "![", "\\", "$", "\\(", "|"),
    *("\n", "\n\n", "  \n", "\n> ", "\n- ", "\n  * ", "\n1. ", "\n# ", "\n---\n", "\n|-|-|\n"),
    *("a", "word ", "2024", " ", "\t", "中", "。", "👩‍👩‍👧", "e\u0301", "https://a_b_/", "<br>"),
    "\n| a | b |\n",
]
SOUP = st.lists(st.sampled_from(MARKUP), max_size=40)


def test_blocks_show_as_soon_as_their_kind_is_clear() -> None:
    written: list[str] = []
    stream = MarkdownStream(40, written.append)
    for text, shown in [
        ("- a", ""),
        (" bullet\n", "• a bullet"),
        ("#", "• a bullet"),
        ("# Head ", "• a bullet\nHead"),
        ("**bo", "• a bullet\nHead"),
        ("ld** x", "• a bullet\nHead bold"),
        ("\n```\ncode\n", "• a bullet\nHead bold x\ncode\n"),
        ("```\n中文", "• a bullet\nHead bold x\ncode\n中"),
    ]:
        stream.feed(text)
        assert visible("".join(written)) == shown


def test_an_opener_is_held_for_200_characters_at_most() -> None:
    written: list[str] = []
    stream = MarkdownStream(40, written.append)
    stream.feed("**" + "word " * 50)
    assert "".join(written).startswith("**word ")


@pytest.mark.parametrize(
    "text",
    ["- " * 2000 + "x", "> " * 2000 + "x", "*a " * 2000, "[" * 3000, "`a" * 3000, "**`" * 2000],
    ids=lambda text: text[:4],
)
def test_hostile_nesting_is_rendered(text: str) -> None:
    assert letters(visible(render(text))) == letters(text)


@given(SOUP, st.data())
def test_pieces_make_no_difference(soup: list[str], data: st.DataObject) -> None:
    text = "".join(soup)
    cut = data.draw(st.integers(0, len(text)))
    assert render(text) == render(*text) == render(*soup) == render(text[:cut], text[cut:])


@given(SOUP | st.lists(st.text(st.characters(exclude_categories=["Cc", "Cs"]))))
def test_the_only_controls_are_colours_and_line_ends(soup: list[str]) -> None:
    shown = render(*soup)
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f]", visible(shown))
    assert not shown or re.search(r"\S[^\S\n]*\n\Z", shown)
    colours = SGR.findall(shown)
    assert colours[-1:] in ([], ["\x1b[0m"])


@given(SOUP.map("".join))
def test_no_word_is_lost_repeated_or_moved(text: str) -> None:
    text = re.sub("```|~~~", "", text)  # what follows an opening fence is its name
    assume("```" not in text and "~~~" not in text)
    assert letters(visible(render(text, width=10_000))) == letters(text)


@given(PROSE, st.integers(20, 60))
def test_prose_keeps_its_words_within_the_width(words: list[str], width: int) -> None:
    shown = render(" ".join(words), width=width)
    assert shown.split() == words
    assert max(map(len, shown.splitlines())) <= width


@given(CHINESE, st.sampled_from(["", "- ", "> ", "3. ", "# ", "| "]), st.integers(20, 60))
def test_chinese_keeps_within_the_width(text: str, start: str, width: int) -> None:
    shown = visible(render(start + text, width=width))
    assert letters(shown) == letters(start + text)
    assert max(map(cell_len, shown.splitlines())) <= width


@given(PROSE)
def test_every_word_shows_at_the_space_after_it(words: list[str]) -> None:
    written: list[str] = []
    stream = MarkdownStream(30, written.append)
    for count, word in enumerate(words, 1):
        stream.feed(word + " ")
        assert "".join(written).split() == words[:count]
