import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dots1_local.cli._output import ControlFilter
from tests.helpers import write_random_gguf
from tests.workers import start_dots1

BIDI = [*range(0x202A, 0x202F), *range(0x2066, 0x206A)]
CONTROLS = {chr(code) for code in [*range(0x20), *range(0x7F, 0xA0), *BIDI]} - {"\n", "\t"}

# Characters that sequences consist of, so that random text has many of them.
SOUP = st.text(st.sampled_from("\x1b\x1b\x1b\x9b\x9d\x90\x9c\x07\x18\r\n\t\x00[]PX^_\\()0;1m?A中é"))
SENTENCE = st.text(
    st.characters(exclude_categories=["Cc", "Cs"], exclude_characters=CONTROLS)
    | st.sampled_from("\n\t")
)


def filtered(*pieces: str) -> str:
    control_filter = ControlFilter()
    return "".join(map(control_filter.feed, pieces))


@pytest.mark.parametrize(
    "sequence",
    [
        "\x1b[31m",
        "\x1b[?1049h",
        "\x1b[2 q",
        "\x1b[>4;2m",
        "\x1b]0;title\x07",
        "\x1b]52;c;Y2F0\x1b\\",
        "\x1b]8;;https://example.com\x1b\\",
        "\x1b]0;中文\x9c",
        "\x1bP1$r0m\x1b\\",
        "\x1b_Gf=24;AAAA\x1b\\",
        "\x1b^private\x1b\\",
        "\x1bXstart of string\x1b\\",
        "\x1bc",
        "\x1b7",
        "\x1b(0",
        "\x1b#8",
        "\x1b%G",
        "\x9b31m",
        "\x9d0;title\x07",
        "\x90q#0\x9c",
        "\x85",
        "\x07",
        "\x08\x08",
        "\x0e",
        "\x7f",
        "\x1b\x1b[1m",
        "\x1b[3\x1b[1m",
        "\x1b]0;cut\x18",
        "\u202e",
        "\u2066\u2069",
    ],
)
def test_a_control_sequence_is_dropped_whole(sequence: str) -> None:
    assert filtered(f"before{sequence}after") == "beforeafter"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one\r\ntwo\r\n", "one\ntwo\n"),
        ("10%\r20%\r30%", "10%\n20%\n30%"),  # nothing read is overwritten
        ("a\r\r\nb", "a\n\nb"),
        ("a\n\nb\tc", "a\n\nb\tc"),
        ("a\r\x1b[m\nb", "a\n\nb"),
    ],
)
def test_line_ends_are_newlines(text: str, expected: str) -> None:
    assert filtered(text) == expected


def test_text_after_an_incomplete_sequence_is_kept() -> None:
    assert filtered("a\x1b[3中文") == "a中文"
    assert filtered("a\x1b\nb") == "a\nb"
    assert filtered("a\x1b[31\nb") == "a\nb"


def test_an_endless_payload_does_not_swallow_the_answer() -> None:
    story = "once upon a time " * 1000
    shown = filtered("\x1b]52;c;" + story)
    assert len(shown) > 0.9 * len(story)
    assert story.endswith(shown)


def test_a_new_stream_may_begin_after_an_unfinished_one() -> None:
    control_filter = ControlFilter()
    assert control_filter.feed("a\x1b]0;title") == "a"
    control_filter.finish()
    assert control_filter.feed("title") == "title"


@pytest.mark.parametrize(
    "text",
    [
        "👩‍👩‍👧 👍🏽 ❤️ 🇨🇳",
        "e\u0301 สวัสดี नमस्ते",
        "שלום مرحبا\u200f",
        "中文，かな、한글",
        "a\u00a0b\u00adc",
    ],
)
def test_text_in_any_script_is_unchanged(text: str) -> None:
    assert filtered(text) == text


@given(SENTENCE)
def test_plain_text_is_unchanged(text: str) -> None:
    assert filtered(text) == text


@given(SOUP | st.text())
def test_no_control_character_is_left(text: str) -> None:
    shown = filtered(text)
    assert not CONTROLS & set(shown)
    assert all(unicodedata.category(c) != "Cc" for c in shown if c not in "\n\t")


@given(st.lists(SOUP))
def test_pieces_make_no_difference(pieces: list[str]) -> None:
    assert filtered(*pieces) == filtered("".join(pieces)) == filtered(*"".join(pieces))


PRINTS = """
import os, sys
from dots1_local.cli._output import quiet_drivers, show_engine_log
if "-v" in sys.argv:
    show_engine_log()
with quiet_drivers():
    os.write(2, b"a driver\\n")
    print("the program", file=sys.stderr)
os.write(2, b"afterwards\\n")
print("the program again", file=sys.stderr)
"""


@pytest.mark.parametrize(("option", "driver"), [("", ""), ("-v", "a driver\n")])
def test_what_drivers_print_is_dropped_unless_asked_for(option: str, driver: str) -> None:
    command = [sys.executable, "-c", PRINTS, option]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == f"{driver}the program\nafterwards\nthe program again\n"


def test_stderr_may_be_closed() -> None:
    script = "from dots1_local.cli._output import quiet_drivers\nwith quiet_drivers(): print(1)"
    done = subprocess.run(
        ["sh", "-c", 'exec "$0" -c "$1" 2>&-', sys.executable, script],
        capture_output=True,
        check=True,
    )
    assert done.stdout == b"1\n"


def test_verbose_shows_what_the_engine_logs(tmp_path: Path) -> None:
    model, text = write_random_gguf(tmp_path / "model.gguf"), tmp_path / "text.txt"
    text.write_text("abc" * 100)
    verb = ("perplexity", str(model), "-f", str(text), "-c", "64", "-t", "1")
    for options, shown in (((), False), (("-v",), True)):
        with start_dots1(*options, *verb) as process:
            out, err = process.communicate(timeout=60)
        assert "PPL" in out
        assert ("llama_model_loader" in err) == shown
        assert shown or not err
