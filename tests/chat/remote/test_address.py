"""Addresses of servers and API keys: which are accepted or refused, and what is shown."""

import pytest

from dots1_local.chat.remote.address import Key, is_exposed, key_from, parse_address
from dots1_local.errors import UsageError


@pytest.mark.parametrize(
    ("typed", "url"),
    [
        ("http://127.0.0.1:8000/v1", "http://127.0.0.1:8000/v1"),
        ("http://127.0.0.1:8000/v1/", "http://127.0.0.1:8000/v1"),
        ("HTTPS://Example.org", "https://example.org"),
        ("http://[::1]:8000/v1", "http://[::1]:8000/v1"),
        ("http://bücher.example/a b".replace(" ", "%20"), "http://xn--bcher-kva.example/a%20b"),
        ("http://host/@cf/v1", "http://host/@cf/v1"),
        ("http://host/v1?", "http://host/v1"),
        ("http://host/v1#", "http://host/v1"),
        ("http://host/中/v1", "http://host/%E4%B8%AD/v1"),
    ],
)
def test_an_address_is_normalised(typed: str, url: str) -> None:
    assert str(parse_address(typed)) == url


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("localhost:8000/v1", "http://HOST:8000/v1"),
        ("ftp://host/v1", "http or https"),
        ("http://", "http or https"),
        ("", "http or https"),
        ("http://host:port/v1", "host:port"),
        ("http://host:99999/v1", "host:99999"),
        ("http://[::1/v1", r"http://\[::1/v1"),
        ("http://" + "a" * 99 + "/v1", "a" * 99),
        ("http://host/v1?key=secret", "path"),
        ("http://host/v1#secret", "path"),
        ("http://me:secret@host/v1", "DOTS1_API_KEY"),
        ("http://me:secret@host:port/v1", "DOTS1_API_KEY"),
        ("ftp://secret@host/v1", "DOTS1_API_KEY"),
        ("http://me:secret@[::1/v1", "DOTS1_API_KEY"),
        ("http://host/v1\r\nX: y", "control characters"),
        ("http://ho st/v1", "blanks"),
    ],
)
def test_a_malformed_address_is_refused(typed: str, words: str) -> None:
    with pytest.raises(UsageError, match=f"--url.*{words}") as refused:
        parse_address(typed)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("url", "exposed"),
    [
        ("http://example.org/v1", True),
        ("http://8.8.8.8/v1", True),
        ("https://example.org/v1", False),
        ("http://127.0.0.1/v1", False),
        ("http://localhost/v1", False),
        ("http://[::1]/v1", False),
        ("http://192.168.1.9/v1", False),
        ("http://100.100.1.1/v1", False),  # a carrier's or an overlay network's
        ("http://gpubox/v1", False),
        ("http://gpubox.local/v1", False),
    ],
)
def test_a_key_is_exposed_if_the_internet_may_read_it(url: str, exposed: bool) -> None:
    assert is_exposed(parse_address(url)) is exposed


def test_the_projects_own_variable_comes_first() -> None:
    both = {"DOTS1_API_KEY": " ours\n", "OPENAI_API_KEY": "theirs"}
    key = key_from(both)
    assert key is not None
    assert (key.text, key.variable) == ("ours", "DOTS1_API_KEY")
    assert key_from({"DOTS1_API_KEY": "", "OPENAI_API_KEY": "x"}) is not None
    assert key_from({}) is None


@pytest.mark.parametrize("text", ["a\nb", "schlüssel", "a\x1b[31m"])
def test_a_key_that_no_header_can_hold_is_refused_and_not_shown(text: str) -> None:
    with pytest.raises(UsageError, match="OPENAI_API_KEY") as refused:
        key_from({"OPENAI_API_KEY": text})
    assert text not in str(refused.value)


def test_nothing_shows_a_key() -> None:
    key = Key("s3cret", "DOTS1_API_KEY")
    assert "s3cret" not in f"{key!r} {key} {key.hidden_in('Incorrect key s3cret')}"
