import math

import numpy as np
import pytest

from dots1_local.chat.sampling import Sampling
from dots1_local.serve.generation import (
    GenerationRequest,
    Piece,
    Queue,
    QueueFull,
    RequestHandle,
    TokenLogprob,
)
from dots1_local.serve.pieces import PieceBuilder, token_logprob
from dots1_local.serve.scheduler import PrefillBudget


def settled(tokens_a_second: float, overhead: float, n_ubatch: int = 512) -> int:
    """Return the budget after many steps on a machine of this speed."""
    budget = PrefillBudget(n_ubatch)
    for _ in range(50):
        budget.record(budget.tokens, overhead + budget.tokens / tokens_a_second)
    return budget.tokens


@pytest.mark.parametrize(
    ("tokens_a_second", "overhead", "beside"),
    [
        (5000, 0.02, 512),  # a GPU: whole ubatches
        (100, 0.2, 80),  # 0.2 s and 80 tokens take a second
        (10, 0.2, 32),  # never less
    ],
)
def test_the_budget_makes_a_step_take_about_a_second(
    tokens_a_second: float, overhead: float, beside: int
) -> None:
    assert settled(tokens_a_second, overhead) == pytest.approx(beside, abs=2)


def test_one_slow_step_halves_the_budget_and_small_steps_do_not_count() -> None:
    budget = PrefillBudget(512)
    for _ in range(10):
        budget.record(512, 0.1)
    budget.record(512, 60)
    assert budget.tokens == 256
    budget.record(3, 60)
    assert budget.tokens == 256
    budget.record(256, 0)
    assert budget.tokens == 512


def test_the_budget_is_at_most_a_ubatch() -> None:
    assert settled(5000, 0, n_ubatch=16) == settled(1, 0, n_ubatch=16) == 16


def retry_after(wanted: int, slots: int, *recent: float) -> int:
    """Return the estimate for `wanted` choices when all slots are taken and none may wait."""
    queue, handle = Queue(0, slots), RequestHandle(lambda event: None)
    for seconds in recent:
        queue.record(seconds)
    with pytest.raises(QueueFull) as refused:
        queue.put(handle, [GenerationRequest((1,), Sampling())] * wanted, running=slots)
    return refused.value.retry_after


def test_the_estimate_averages_recent_choices() -> None:
    assert retry_after(1, 4) == 1
    recent = (1000.0, *[8.0] * 16)
    assert retry_after(1, 4, *recent) == 2
    assert retry_after(5, 4, *recent) == 10
    assert retry_after(1, 32, *recent) == 1


def pieces_of(text: bytes, *stop: str, cut: int = 1) -> list[tuple[str, bytes]]:
    """Return the pieces of an answer with tokens of `cut` bytes, and their logprobs' bytes."""
    answer = PieceBuilder(0, stop)
    pieces: list[Piece | None] = []
    for start in range(0, len(text), cut):
        if answer.stopped:
            break
        part = text[start : start + cut]
        pieces.append(answer.add(start, part, TokenLogprob(start, part, -1.0)))
    pieces.append(answer.finish())
    return [(p.text, b"".join(each.piece for each in p.logprobs)) for p in pieces if p]


def test_a_character_comes_with_the_logprobs_of_all_its_tokens() -> None:
    assert pieces_of("中文".encode()) == [("中", "中".encode()), ("文", "文".encode())]


def test_half_a_character_is_not_text_but_its_tokens_have_logprobs() -> None:
    assert pieces_of("中".encode()[:2]) == [("", "中".encode()[:2])]


def test_tokens_after_the_stop_string_have_no_logprobs() -> None:
    assert pieces_of(b"abcdef", "cd") == [("a", b"a"), ("b", b"b")]
    assert pieces_of(b"abcdef", "ce", "cdx") == [
        ("a", b"a"),
        ("b", b"b"),
        ("cde", b"cde"),
        ("f", b"f"),
    ]
    assert pieces_of(b"abcd", "cdx") == [("a", b"a"), ("b", b"b"), ("cd", b"cd")]
    assert pieces_of(b"abc", "c", "bcd") == [("a", b"a"), ("b", b"b")]


def test_a_token_in_which_the_stop_string_begins_has_logprobs() -> None:
    assert pieces_of(b"abcdefgh", "d", cut=3) == [("abc", b"abc")]
    assert pieces_of(b"abcdefgh", "f", cut=3) == [("abc", b"abc"), ("de", b"def")]


@pytest.mark.parametrize("top", [0, 1, 5, 20])
def test_logprobs_are_the_log_softmax_of_the_row(top: int) -> None:
    rng = np.random.default_rng(top)
    row = rng.normal(0, 5, 152_064).astype(np.float32) + 80  # exp of that would overflow
    logs = [float(x) for x in row]
    total = math.fsum(math.exp(x - 80) for x in logs)
    best = sorted(range(len(logs)), key=lambda i: -logs[i])[:top]
    found = token_logprob(row, 7, top, lambda token: b"%d" % token)
    assert (found.token, found.piece) == (7, b"7")
    assert found.logprob == pytest.approx(logs[7] - 80 - math.log(total), abs=1e-5)
    assert [each[:2] for each in found.top] == [(i, b"%d" % i) for i in best]
    for i, (_, _, value) in zip(best, found.top, strict=True):
        assert value == pytest.approx(logs[i] - 80 - math.log(total), abs=1e-5)


def test_logits_may_be_minus_infinity() -> None:
    row = np.array([-np.inf, 100, -np.inf], np.float32)
    found = token_logprob(row, 1, 20, lambda token: b"")
    assert found.logprob == 0
    assert [each[0] for each in found.top] == [1, 0, 2]
    assert found.top[2][2] == -math.inf
