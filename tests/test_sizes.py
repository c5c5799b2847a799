import pytest

from dots1_local.errors import UsageError
from dots1_local.sizes import human_bytes, parse_context, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("48G", 48 * 10**9),
        ("500MB", 5 * 10**8),
        ("1.5 gb", 1_500_000_000),
        (" 24GiB ", 24 * 2**30),
        ("3Ki", 3072),
        ("2TB", 2 * 10**12),
        ("10B", 10),
        ("1234567", 1234567),
    ],
)
def test_reads_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "0", "0.1", "-1G", "1e3", "12 apples", "5iB", "1" * 400])
def test_refuses_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="48G"):
        parse_size(text)


def test_nothing_is_a_size_where_it_makes_sense() -> None:
    assert parse_size("0", minimum=0) == 0
    with pytest.raises(UsageError):
        parse_size("-1", minimum=0)


def test_writes_sizes_in_decimal_units() -> None:
    assert [human_bytes(count) for count in (999, 1536, 24e9, 5e12)] == [
        "999 B", "1.5 kB", "24.0 GB", "5.0 TB",
    ]  # fmt: skip


def test_reads_context_sizes() -> None:
    assert [parse_context(text) for text in ("16k", " 8K", "32768")] == [16384, 8192, 32768]
    for text in ("", "0", "0k", "16kB", "1.5k", "-1", "9" * 20):
        with pytest.raises(UsageError, match="is not a context size"):
            parse_context(text)
