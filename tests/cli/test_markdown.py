import re

import pytest

from dots1_local.cli.repl.markdown import MarkdownStream

SGR = re.compile(r"\x1b\[[0-9;]*m")
BAR = "\x1b[2m│\x1b[0m"


def render(*pieces: str, width: int = 40) -> str:
    written: list[str] = []
    stream = MarkdownStream(width, written.append)
    for piece in pieces:
        stream.feed(piece)
    stream.finish()
    return "".join(written)


def visible(text: str) -> str:
    return SGR.sub("", text)


def letters(text: str) -> str:
    return "".join(filter(str.isalnum, text))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a **bold** word", "a \x1b[1mbold\x1b[0m word"),
        ("*it* and ***both***.", "\x1b[3mit\x1b[0m and \x1b[1;3mboth\x1b[0m."),
        ("**a *b* c**", "\x1b[1ma \x1b[0m\x1b[1;3mb\x1b[0m\x1b[1m c\x1b[0m"),
        ("_it_ in snake_case_names", "\x1b[3mit\x1b[0m in snake_case_names"),
        ("`a * b` ``x`y``", "\x1b[36ma * b\x1b[0m \x1b[36mx`y\x1b[0m"),
        ("**see `a**b` now**", "\x1b[1msee \x1b[0m\x1b[1;36ma**b\x1b[0m\x1b[1m now\x1b[0m"),
        ("~~gone~~ ~5", "\x1b[9mgone\x1b[0m ~5"),
        ("[dots](https://d.io)", "\x1b[4mdots\x1b[0m \x1b[2m(https://d.io)\x1b[0m"),
        ("![alt](a_(b).png)", "\x1b[4malt\x1b[0m \x1b[2m(a_(b).png)\x1b[0m"),
        ("[https://d.io](https://d.io)", "\x1b[4mhttps://d.io\x1b[0m"),
        ("见https://d.io。**重点**", "见https://d.io。\x1b[1m重点\x1b[0m"),
        ("[d](https://d.io)**b**", "\x1b[4md\x1b[0m \x1b[2m(https://d.io)\x1b[0m\x1b[1mb\x1b[0m"),
        ("**“重点”**在这里", "\x1b[1m“重点”\x1b[0m在这里"),
        (r"\*not\* \_it\_ C:\dir", "*not* _it_ C:\\dir"),
    ],
)
def test_spans(text: str, expected: str) -> None:
    assert render(text) == expected + "\n"


@pytest.mark.parametrize(
    "text",
    [
        "2 * 3 * 4 = 24 and 2*3*4 too",
        "an unclosed **bold",
        "**",
        "a * b",
        "one ` backtick",
        "[1] and [x] (y)",
        "$x_1$ and $a_{1}*b*c_2$",
        r"\(a_1 * b*c\) \[x_*y*_z\]",
        "$5 and *$10",
        "<b>HTML</b> &amp; <br>",
        "__init__ and __main__.py",
        "https://a.io/_x_/*y*",
        "#hashtag",
        "1.5 is no item",
        "| no table",
        "-5 degrees",
        "!",
        "\\",
    ],
)
def test_text_that_is_not_markup_stays(text: str) -> None:
    assert render(text) == text + "\n"


def test_headings_have_colour_and_paragraphs_one_blank_line_between() -> None:
    text = "\n\n# Title\n## Part *one*\n\n\n\ntext\n### Third\n\n\n"
    assert render(text) == (
        "\x1b[1;4;35mTitle\x1b[0m\n"
        "\x1b[1;35mPart \x1b[0m\x1b[1;35;3mone\x1b[0m\n"
        "\n"
        "text\n"
        "\x1b[1;35mThird\x1b[0m\n"
    )


def test_lists_nest_and_hang() -> None:
    text = """\
1. **Mix** the dough until it comes together
   - cold water
   - salt, which goes in last of all things
     * deeper
2. Bake

   for an hour.
10) Eat
- other
lazy line

end
"""
    assert render(text, width=30) == (
        "1. \x1b[1mMix\x1b[0m the dough until it\n"
        "   comes together\n"
        "   • cold water\n"
        "   • salt, which goes in last\n"
        "     of all things\n"
        "     • deeper\n"
        "2. Bake\n"
        "\n"
        "   for an hour.\n"
        "10) Eat\n"
        "• other\n"
        "  lazy line\n"
        "\n"
        "end\n"
    )


def test_chinese_is_wrapped_by_display_width() -> None:
    text = "1. 动态量化是一种**方法**，它把模型存储。\n- GPT模型（大）"
    assert render(text, width=20) == (
        "1. 动态量化是一种\x1b[1m方\x1b[0m\n"
        "   \x1b[1m法\x1b[0m，它把模型存\n"
        "   储。\n"
        "• GPT模型（大）\n"
    )


def test_punctuation_stays_with_its_neighbour() -> None:
    assert render("一二三四五六七八九（十）", width=20) == "一二三四五六七八九\n（十）\n"
    assert render("一二三四五六七八九十。", width=20) == "一二三四五六七八九\n十。\n"
    assert render("见https://example.com/a-long-page。好", width=20) == (
        "见\nhttps://example.com/a-long-page。\n好\n"
    )


def test_a_line_ends_where_the_model_ends_it() -> None:
    verse = "one\ntwo  \nthree\\\nfour\n春眠不觉晓\n处处闻啼鸟"
    assert render(verse) == "one\ntwo\nthree\nfour\n春眠不觉晓\n处处闻啼鸟\n"


def test_a_word_wider_than_the_line_is_written_at_once() -> None:
    written: list[str] = []
    stream = MarkdownStream(20, written.append)
    stream.feed("see " + "x" * 100)
    assert "".join(written) == "see\n" + "x" * 100
    stream.feed("yz and so")
    stream.finish()
    assert "".join(written) == "see\n" + "x" * 100 + "yz\nand so\n"


def test_code_is_not_rendered() -> None:
    text = """\
Run:
```python
# no *heading*

- no **item**: a line that is longer than the width
\tif x:  return `y`
```
after
"""
    assert render(text, width=30) == (
        "Run:\n"
        "\x1b[36m# no *heading*\x1b[0m\n"
        "\n"
        "\x1b[36m- no **item**: a line that is longer than the width\x1b[0m\n"
        "\x1b[36m    if x:  return `y`\x1b[0m\n"
        "after\n"
    )


def test_code_in_an_item_is_indented_with_it() -> None:
    text = "1. Do\n   ~~~~\n   a:\n     ~~~\n   ~~~~\n2. `x`"
    assert render(text) == (
        "1. Do\n   \x1b[36ma:\x1b[0m\n   \x1b[36m  ~~~\x1b[0m\n2. \x1b[36mx\x1b[0m\n"
    )


def test_an_unclosed_fence_ends_with_the_answer() -> None:
    assert render("a\n\n```sh\nls\n\n\necho") == (
        "a\n\n\x1b[36mls\x1b[0m\n\n\n\x1b[36mecho\x1b[0m\n"
    )
    assert render("a\n\n```sh\n\n\n") == "a\n"


def test_quotes_have_a_bar() -> None:
    text = "> quoted text that is *long*\n>\n> - item\n> > deep\n\nplain"
    assert render(text, width=20) == (
        f"{BAR} quoted text that\n"
        f"{BAR} is \x1b[3mlong\x1b[0m\n"
        f"{BAR}\n"
        f"{BAR} • item\n"
        f"{BAR} {BAR} deep\n"
        "\n"
        "plain\n"
    )


def test_a_rule_fills_the_line() -> None:
    assert render("a\n\n---\n* * *\nb", width=20) == (
        "a\n\n" + 2 * f"\x1b[2m{'─' * 20}\x1b[0m\n" + "b\n"
    )


def test_tables_are_aligned_by_display_width() -> None:
    text = "Sizes:\n| 类型 | size |\n|:-----|---:|\n| 动态 **Q4** | 9 |\n| a \\| b |\n\nend"
    assert render(text) == (
        "Sizes:\n"
        f"\x1b[1m类型\x1b[0m    {BAR} \x1b[1msize\x1b[0m\n"
        "\x1b[2m────────┼─────\x1b[0m\n"
        f"动态 \x1b[1mQ4\x1b[0m {BAR}    9\n"
        f"a | b   {BAR}\n"
        "\n"
        "end\n"
    )


def test_wide_tables_are_wrapped_into_their_columns() -> None:
    text = "| a | b |\n|:-:|---|\n| 1 | the quick brown fox 动态量化 |\n"
    assert visible(render(text, width=20)) == (
        "a │ b\n"
        "──┼─────────────────\n"
        "1 │ the quick brown\n"
        "  │ fox 动态量化\n"
    )  # fmt: skip


def test_a_table_with_too_many_columns_keeps_its_words() -> None:
    header = "|".join(f"c{place}" for place in range(20))
    shown = render(f"|{header}|\n{'|-' * 20}|\n|{header}|\n", width=40)
    assert letters(visible(shown)) == 2 * letters(header)


def test_blank_text_renders_nothing() -> None:
    assert render("") == render("\n \n\t\n") == ""
