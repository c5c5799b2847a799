"""Addresses of servers and their keys: what is taken, what is refused, and what is shown."""

import pytest

from dots1_local.chat.remote.address import Address, Key, key_from
from dots1_local.errors import UsageError


@pytest.mark.parametrize(
    ("typed", "url"),
    [
        ("http://127.0.0.1:8000/v1", "http://127.0.0.1:8000/v1"),
        ("http://127.0.0.1:8000/v1/", "http://127.0.0.1:8000/v1"),
        ("HTTPS://Example.org", "https://example.org"),
        ("http://[::1]:8000/v1", "http://[::1]:8000/v1"),
        ("http://bücher.example/a b".replace(" ", "%20"), "http://xn--bcher-kva.example/a%20b"),
        ("http://host/@cf/v1", "http://host/%40cf/v1"),
        ("http://host/中/v1", "http://host/%E4%B8%AD/v1"),
    ],
)
def test_an_address_is_taken_as_it_is_meant(typed: str, url: str) -> None:
    assert Address.parse(typed).url == url


@pytest.mark.parametrize(
    ("typed", "sentence"),
    [
        ("localhost:8000/v1", "no http or https address; give it as http://HOST:8000/v1"),
        ("ftp://host/v1", "no http or https address"),
        ("http://", "no http or https address"),
        ("", "no http or https address"),
        ("http://host:port/v1", "which is no address"),
        ("http://host:99999/v1", "which is no address"),
        ("http://[::1/v1", "which is no address"),
        ("http://" + "a" * 99 + "/v1", "which is no address"),
        ("http://host/v1?key=secret", "more than a path"),
        ("http://me:secret@host/v1", "put the key into DOTS1_API_KEY"),
        ("http://me:secret@host:port/v1", "put the key into DOTS1_API_KEY"),
        ("ftp://secret@host/v1", "put the key into DOTS1_API_KEY"),
        ("http://me:secret@[::1/v1", "put the key into DOTS1_API_KEY"),
        ("http://host/v1\r\nX: y", "blanks or control characters"),
        ("http://ho st/v1", "blanks or control characters"),
    ],
)
def test_what_is_none_is_refused(typed: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence) as refused:
        Address.parse(typed)
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
        ("http://100.100.1.1/v1", False),  # a carrier's or an overlay network's own
        ("http://gpubox/v1", False),
        ("http://gpubox.local/v1", False),
    ],
)
def test_a_key_is_exposed_where_the_internet_may_read_it(url: str, exposed: bool) -> None:
    assert Address.parse(url).exposed is exposed


def test_the_projects_own_variable_comes_first() -> None:
    both = {"DOTS1_API_KEY": " ours\n", "OPENAI_API_KEY": "theirs"}
    key = key_from(both)
    assert key is not None
    assert (key.text, key.variable) == ("ours", "DOTS1_API_KEY")
    assert key_from({"DOTS1_API_KEY": "", "OPENAI_API_KEY": "x"}) is not None
    assert key_from({}) is None


@pytest.mark.parametrize("text", ["a\nb", "schlüssel", "a\x1b[31m"])
def test_a_key_that_no_header_can_hold_is_refused_unseen(text: str) -> None:
    with pytest.raises(UsageError, match="OPENAI_API_KEY has characters") as refused:
        key_from({"OPENAI_API_KEY": text})
    assert text not in str(refused.value)


def test_nothing_shows_a_key() -> None:
    key = Key("s3cret", "DOTS1_API_KEY")
    assert "s3cret" not in f"{key!r} {key} {key.hidden_in('Incorrect key s3cret')}"
